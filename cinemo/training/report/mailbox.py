"""How rank 0's reports reach the job's own process: a small actor's content, without Ray and without torch.

Ray imports this module in the actor's process, so it stays light; events travel as pickled bytes for the same reason.
"""

from __future__ import annotations


class Mailbox:
    """Events in the order they were posted, the first fault that no restart can mend, and whether to end."""

    def __init__(self) -> None:
        self._stopping = False
        self._events: list[bytes] = []
        self._fault: tuple[str, str] | None = None

    def post(self, event: bytes) -> None:
        self._events.append(event)

    def take(self) -> list[bytes]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events

    def post_fault(self, kind: str, message: str) -> None:
        """Remember the name and message of an exception, unless there is one already."""
        self._fault = self._fault or (kind, message)

    def fault(self) -> tuple[str, str] | None:
        return self._fault

    def stop(self) -> None:
        """The command was told to end: the workers save, and end."""
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping
