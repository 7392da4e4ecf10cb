"""A job, as it stands in the database."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Row

from cinemo.serving.store.media import image_name, input_name

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
FINAL: tuple[Status, ...] = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class Job:
    """One row. Times are Unix seconds; ``progress`` is 0..100; ``request`` are the controls as they were accepted.

    ``step`` of ``steps`` of the sampler in this attempt (of a queued job those that are expected); ``client`` is a
    key's id, or empty; ``media_name`` is the video of a completed job. ``seconds_left``: an estimate, of an unfinished
    job that was asked for; None where nothing was measured.
    """

    number: int
    id: str
    client: str
    status: Status
    progress: int
    step: int
    steps: int
    attempts: int
    worker: str | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    deadline_at: float | None
    request: Mapping[str, Any]
    media_name: str | None
    error_code: str | None
    error_message: str | None
    seconds_left: float | None = field(default=None, compare=False)

    @property
    def files(self) -> dict[str, str]:
        """What the job came with: by name (``image``, and what its model takes beside it), the media store's names."""
        others = {name: input_name(self.id, name) for name in self.request.get("inputs", ())}
        return {"image": image_name(self.id), **others}


def job_of(row: Row[Any]) -> Job:
    """The job of a row of the table."""
    progress = 100 if row.status == "completed" else min(99, 100 * row.step // max(1, row.steps))
    return Job(
        row.number, row.id, row.client, row.status, progress, row.step, row.steps, row.attempts, row.worker,
        row.created_at, row.started_at, row.completed_at, row.expires_at, row.deadline_at, json.loads(row.request),
        row.media_name, row.error_code, row.error_message,
    )  # fmt: skip
