"""What finished jobs were asked, so that the same request need not be worked off again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from sqlalchemy import Row, delete, insert, select, update

import cinemo
from cinemo.serving.store.admission import fingerprint
from cinemo.serving.store.database import Database, Transaction
from cinemo.serving.store.tables import jobs, results

Reuse = Literal["off", "own", "all"]
"""Whose finished videos may answer a request: nobody's, those of the same key, or any of this deployment's."""

# What decides nothing.
_NOT_ASKED = ("predicted_motion", "predicted_quality", "previews", "prompt_tokens", "remixed_from_video_id")


def weights_digest(bundle: str, adapter: str | None) -> str:
    """What names the weights that make a video: the digest of a bundle, and the sha256 of an adapter."""
    return bundle if adapter is None else f"{bundle}+{adapter}"


def asked_key(request: Mapping[str, Any], image: bytes, others: Mapping[str, bytes] | None) -> str:
    """sha256 of all that decides a video but the model's weights."""
    return fingerprint(request, image, _NOT_ASKED, others)


def deciding(names: Collection[str]) -> set[str]:
    """Those names of a request that decide its video."""
    return set(names) - set(_NOT_ASKED)


def expect(transaction: Transaction, job_id: str, key: str) -> None:
    """Note what a new job was asked."""
    transaction.execute(insert(results).values(job_id=job_id, key=key))


def keep(transaction: Transaction, job_id: str, digest: str) -> None:
    """Note which bundle made the job's video."""
    transaction.execute(update(results).where(results.c.job_id == job_id).values(made_by=_maker(digest)))


def forget(transaction: Transaction, job_ids: Collection[str]) -> None:
    """Remove what was noted of jobs that are gone."""
    transaction.execute(delete(results).where(results.c.job_id.in_(list(job_ids))))


def find(database: Database, key: str, digest: str, client: str | None) -> Row[Any] | None:
    """The last job that was asked the same and completed by the same bundle; ``client``: whose it must be."""
    same = (results.c.key == key, results.c.made_by == _maker(digest), jobs.c.status == "completed")
    query = select(jobs).join(results, results.c.job_id == jobs.c.id).where(*same)
    if client is not None:
        query = query.where(jobs.c.client == client)
    rows = database.read(query.order_by(jobs.c.number.desc()).limit(1))
    return rows[0] if rows else None


def _maker(digest: str) -> str:
    return f"{cinemo.__version__}/{digest}"
