"""The notebooks run from top to bottom, and what is stored of them has figures to look at."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def figures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_figures_and_without_errors(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert figures(notebook) >= 1
    assert not [each for cell in notebook.cells for each in cell.get("outputs", []) if each.output_type == "error"]
    assert path.stat().st_size < 1_500_000
    for place in ("/tmp/", "site-packages", "/home/", "/root/"):
        assert place not in path.read_text(), f"a place of the machine it was run on: {place}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND")  # conftest.py's, which the kernel would inherit and draw nothing in the notebook
    notebook = nbformat.read(path, as_version=4)
    stored = figures(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert figures(notebook) == stored
