"""API keys: who may ask, how much, and nothing in the database that would let its reader ask."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from sqlalchemy import Row, bindparam, insert, select, update

from cinemo.serving.store.database import Database, Transaction
from cinemo.serving.store.tables import keys
from cinemo.types import InputError

_TOKEN = re.compile(r"cin_([0-9a-f]{12})_([0-9a-f]{64})")
_NO_HASH = hashlib.sha256(b"no such key").hexdigest()
_GET = select(keys).where(keys.c.id == bindparam("id"))


@dataclass(frozen=True)
class Quota:
    """What one key may hold: unfinished jobs at once, and jobs in a UTC day; None = no limit."""

    max_active: int | None = None
    per_day: int | None = None


@dataclass(frozen=True)
class Key:
    """A key without its secret. ``id`` is the client of the jobs it submits; times are Unix seconds."""

    id: str
    name: str
    created_at: float
    revoked_at: float | None
    quota: Quota


class KeyStore:
    """Tokens are ``cin_<id>_<secret>``; of the 256-bit secret only a sha256 is stored, which such a secret needs no
    salt or slow hash to protect."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, max_active: int | None = None, per_day: int | None = None) -> tuple[Key, str]:
        """A new key and its token, which nobody can show again.

        Raises:
            InputError: an empty name or one with control characters, or a limit below 1.
        """
        if not name.strip() or len(name) > 200 or not name.isprintable():
            raise InputError(f"name {name[:200]!r}: expected 1 to 200 printable characters")
        for limit, value in (("max_active", max_active), ("per_day", per_day)):
            if value is not None and value < 1:
                raise InputError(f"{limit} {value}: expected at least 1, or leave it out")
        key_id, secret = secrets.token_hex(6), secrets.token_hex(32)

        def work(transaction: Transaction) -> Key:
            row = transaction.execute(_GET, {"id": key_id}).one_or_none()
            if row is not None:  # committed, and the answer was lost
                return _key(row)
            now = transaction.now()
            values = {"id": key_id, "name": name, "secret_hash": _hash(secret), "created_at": now}
            transaction.execute(insert(keys).values(max_active=max_active, per_day=per_day, **values))
            return Key(key_id, name, now, None, Quota(max_active, per_day))

        return self._database.transact(work), f"cin_{key_id}_{secret}"

    def check(self, token: str) -> Key | None:
        """The key of a token; None where it is malformed, unknown or revoked, in the same time for each of the last."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        key_id, secret = match.groups()
        rows = self._database.read(_GET, {"id": key_id})
        expected = rows[0].secret_hash if rows else _NO_HASH
        right = hmac.compare_digest(_hash(secret), expected)
        return _key(rows[0]) if rows and right and rows[0].revoked_at is None else None

    def revoke(self, key_id: str) -> bool:
        """From now on `check` knows it no more; its jobs run on. False: unknown, or revoked before."""

        def work(transaction: Transaction) -> bool:
            statement = update(keys).where(keys.c.id == key_id, keys.c.revoked_at.is_(None))
            found = transaction.execute(statement.values(revoked_at=transaction.now())).rowcount
            return bool(found) or transaction.repeated

        return self._database.transact(work)

    def list(self) -> list[Key]:
        """Every key, the oldest first; revoked ones too."""
        return [_key(row) for row in self._database.read(select(keys).order_by(keys.c.created_at, keys.c.id))]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _key(row: Row[tuple[object, ...]]) -> Key:
    return Key(row.id, row.name, row.created_at, row.revoked_at, Quota(row.max_active, row.per_day))
