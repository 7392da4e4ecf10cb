"""API keys: what a token opens, what the database tells, what a wrong guess costs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from cinemo.serving.store.database import Database
from cinemo.serving.store.keys import KeyStore, Quota
from cinemo.serving.store.tables import keys
from cinemo.types import InputError


@pytest.fixture
def store(database_url: str, open_database: Callable[..., Database]) -> KeyStore:
    return KeyStore(open_database(database_url))


def test_a_token_opens_its_key_until_it_is_revoked(store: KeyStore) -> None:
    key, token = store.create("team a", max_active=2, per_day=10)
    other, other_token = store.create("team b")
    assert store.check(token) == key
    assert key.quota == Quota(max_active=2, per_day=10)
    assert store.check(other_token) == other
    assert [found.name for found in store.list()] == ["team a", "team b"]
    assert store.revoke(key.id)
    assert not store.revoke(key.id)
    assert not store.revoke("unknown")
    assert store.check(token) is None
    assert store.check(other_token) == other
    assert [found.revoked_at is None for found in store.list()] == [False, True]


def test_another_keys_secret_opens_nothing(store: KeyStore) -> None:
    (first, token), (second, other) = store.create("a"), store.create("b")
    crossed = f"cin_{first.id}_{other.rsplit('_', 1)[1]}"
    assert store.check(crossed) is None
    for wrong in (token[:-1], token + "0", token.upper(), token[:-1] + ("0" if token[-1] != "0" else "1"), "", "cin_"):
        assert store.check(wrong) is None
    assert store.check(f"cin_{'0' * 12}_{token.rsplit('_', 1)[1]}") is None
    assert second.id != first.id


def test_the_token_is_nowhere_in_the_database(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/state.sqlite")
    store = KeyStore(database)
    _, token = store.create("team a")
    assert store.check(token)
    secret = token.rsplit("_", 1)[1]
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"team a" in content, "this is where the key lies"
    assert secret.encode() not in content
    assert bytes.fromhex(secret) not in content
    assert database.read(select(keys.c.secret_hash))[0][0] == hashlib.sha256(secret.encode()).hexdigest()
    database.close()


@pytest.mark.parametrize(
    ("name", "limits"),
    [("", {}), (" ", {}), ("a\nb", {}), ("x" * 201, {}), ("a", {"max_active": 0}), ("a", {"per_day": -1})],
)
def test_a_bad_name_or_limit_is_refused(store: KeyStore, name: str, limits: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected"):
        store.create(name, **limits)
    assert store.list() == []


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> tuple[KeyStore, str]:
    store = KeyStore(Database(f"sqlite:///{tmp_path_factory.mktemp('keys')}/state.sqlite"))
    return store, store.create("a")[1]


@settings(max_examples=40)
@given(data=st.data())
def test_no_other_text_opens_a_key(lasting: tuple[KeyStore, str], data: st.DataObject) -> None:
    store, token = lasting
    anything = st.text() | st.from_regex(r"\Acin_[0-9a-f]{12}_[0-9a-f]{64}\Z")
    changed = st.integers(0, len(token) - 1).flatmap(
        lambda at: st.characters().map(lambda char: token[:at] + char + token[at + 1 :])
    )
    text = data.draw(anything | changed)
    assert (store.check(text) is not None) == (text == token)
