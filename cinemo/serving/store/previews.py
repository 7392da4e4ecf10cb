"""How a video looks while it is made: the last few frames that its worker showed, for jobs that ask for them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import bindparam, delete, insert, select, update

from cinemo.serving.store.database import Database, Transaction
from cinemo.serving.store.tables import previews

_SHOWN = select(previews).where(previews.c.job_id.in_(bindparam("ids", expanding=True)))


@dataclass(frozen=True)
class Preview:
    """``frames``: data URLs of small pictures, spread evenly over the video, as they would be after ``step``."""

    step: int
    frames: tuple[str, ...]


def show(transaction: Transaction, job_id: str, preview: Preview) -> None:
    """Keep a preview in the place of the one before."""
    values = {"step": preview.step, "frames": json.dumps(preview.frames)}
    if not transaction.execute(update(previews).where(previews.c.job_id == job_id).values(values)).rowcount:
        transaction.execute(insert(previews).values(job_id=job_id, **values))


def shown(database: Database, job_ids: Collection[str]) -> dict[str, Preview]:
    """The last previews of these jobs, by id."""
    rows = database.read(_SHOWN, {"ids": list(job_ids)}) if job_ids else ()
    return {row.job_id: Preview(row.step, tuple(json.loads(row.frames))) for row in rows}


def hide(transaction: Transaction, job_ids: Sequence[str]) -> None:
    """Remove those of jobs that ended."""
    transaction.execute(delete(previews).where(previews.c.job_id.in_(list(job_ids))))
