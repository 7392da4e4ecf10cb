"""What else happens in the transaction that ends jobs."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Row

from cinemo.serving.store.counters import count_finished
from cinemo.serving.store.database import Transaction
from cinemo.serving.store.previews import hide
from cinemo.serving.store.webhooks import announce


def settle(transaction: Transaction, status: str, rows: Sequence[Row[tuple[object, ...]]], now: float) -> None:
    """Jobs have just ended with ``status``: their events become due, their previews go, and they are counted. Comes
    last in a transaction (`count_finished`).

    Args:
        rows: with ``id``, ``created_at`` and ``started_at``.
    """
    if rows:
        ids = [str(row.id) for row in rows]
        announce(transaction, status, ids, now)
        hide(transaction, ids)
        count_finished(transaction, status, rows, now)
