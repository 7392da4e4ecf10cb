"""How many animators the queue asks for: an autoscaling policy of Ray Serve that counts jobs, not requests.

Animators take their jobs from the database, so that Serve sees no request of theirs to count. The policy lives in
Serve's controller and asks the database itself, as Serve's own policy for message brokers asks the broker: it sees a
queue also while no animator runs. No Ray is imported here.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Any, Protocol

from cinemo.serving.store.counters import read_statistics
from cinemo.serving.store.database import Database

log = logging.getLogger(__name__)

_POLL_SECONDS = 2.0


class _Context(Protocol):
    """What of Serve's ``AutoscalingContext`` is used."""

    target_num_replicas: int


def wanted(unfinished: int, slots: int) -> int:
    """Animators for so many unfinished jobs, ``slots`` jobs to each: more would have nothing to do."""
    return math.ceil(unfinished / slots)


class QueueDemand:
    """``ceil(unfinished jobs / slots)``; Serve applies its bounds, and its delays before either direction.

    Args:
        database: URL of the job database.
        slots: jobs that fill an animator's batch.

    The controller's loop must not wait: a thread asks, at most every two seconds, and the last answer counts. Until the
    first one, and while the database does not answer, the number of animators stays.
    """

    def __init__(self, database: str, slots: int) -> None:
        self._url, self._slots = database, slots
        self._database: Database | None = None
        self._unfinished: int | None = None
        self._asked = -math.inf
        self._asking: threading.Thread | None = None

    def __call__(self, context: _Context) -> tuple[int, dict[str, Any]]:
        now = time.monotonic()
        if now - self._asked >= _POLL_SECONDS and (self._asking is None or not self._asking.is_alive()):
            self._asked = now
            self._asking = threading.Thread(target=self._ask, name="cinemo-demand", daemon=True)
            self._asking.start()
        unfinished = self._unfinished  # the thread may change it meanwhile
        if unfinished is None:
            return context.target_num_replicas, {}
        return wanted(unfinished, self._slots), {"unfinished_jobs": unfinished}

    def _ask(self) -> None:
        try:
            if self._database is None:
                self._database = Database(self._url, patience=5.0)
            found = read_statistics(self._database, self._database.now())
            self._unfinished = found.waiting + found.running
        except Exception as error:  # the controller goes on with what it has
            self._unfinished = None
            log.warning("autoscaling: the job database does not answer (%s)", error)
