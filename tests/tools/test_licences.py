"""The page of licences is that of the packages that are installed."""

from __future__ import annotations

from pathlib import Path

from tools import licences


def test_the_page_is_that_of_the_pinned_packages() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "licences.md"
    assert page.read_text().splitlines() == "\n".join(licences.page()).splitlines(), "run python -m tools.licences"


def test_each_package_of_the_closure_states_a_licence() -> None:
    found = licences.closure("cinemo", frozenset({"all"}))
    assert {"torch", "ray", "psycopg-binary", "aiobotocore"} <= set(found)
    assert "pytest" not in found
    assert [name for name, package in found.items() if not licences.licence(package)] == []
    assert "psycopg" not in licences.closure("cinemo", frozenset())
