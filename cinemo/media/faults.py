"""What is wrong with a video file, from its bytes alone: why it cannot be opened, and which bytes it lacks.

A header's count of frames is no evidence of loss: edit lists hide frames, AVI headers count fields and repeats. Bytes
that a file refers to and does not have are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx", b"pnot", b"uuid"})
_UNKNOWN_SIZES = frozenset({0, 0xFFFFFFFF})  # what writers leave that cannot go back
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_SHOWN_TEXT = 40


def opening_fault(path: Path) -> str | None:
    """Why no demuxer knows what to do with a file, where its bytes tell: it is empty, text, or an mp4 without index."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
        if not head:
            return "empty: the file has 0 bytes"
        if not any(head):
            return f"its first {len(head)} bytes are zeros ({size} bytes)"
        text = _text(head)
        if text:
            return f"text, not a video: it begins with {text[:_SHOWN_TEXT]!r} ({size} bytes)"
        if head[4:8] in _BOXES:
            boxes = [kind for kind, _ in _boxes(file, size)]
            if b"moov" not in boxes:
                found = ", ".join(kind.decode("latin-1") for kind in boxes[:8])
                return f"no moov: the index of an mp4 is not in the file, which holds {found} ({size} bytes)"
    return None


def missing_bytes(path: Path, container: str, stream: Any) -> str | None:
    """What a file of this format refers to behind its end, if anything; the stream's packets have been read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if container == "avi":
            end = max(_avi_ends(file, size), default=0)
        elif container.startswith("matroska"):
            end = _segment_end(file)
        else:
            entries = stream.index_entries
            end = entries[-1].pos + entries[-1].size if len(entries) else 0
    return f"its frames reach to byte {end}, the file has {size}" if end > size else None


def _text(head: bytes) -> str | None:
    try:
        text = head.decode("utf-8", "strict" if len(head) < 512 else "ignore")
    except UnicodeDecodeError:
        return None
    return text if all(char.isprintable() or char in "\r\n\t\ufeff" for char in text) else None


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Kind and end of an mp4's outermost boxes."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        place = size if length == 0 else place + max(length, 8)
        yield kind, place


def _avi_ends(file: BinaryIO, size: int) -> Iterator[int]:
    """Where the list of frames ends in each RIFF of an AVI. What comes behind is an index that can do without."""
    place = 0
    while place + 12 <= size:
        file.seek(place)
        kind, length = file.read(4), int.from_bytes(file.read(4), "little")
        if kind != b"RIFF" or length in _UNKNOWN_SIZES:
            return
        inner, place = place + 12, place + 8 + length + length % 2
        while inner + 12 <= min(place, size):
            file.seek(inner)
            kind, length, name = file.read(4), int.from_bytes(file.read(4), "little"), file.read(4)
            if (kind, name) == (b"LIST", b"movi"):
                if length not in _UNKNOWN_SIZES:
                    yield inner + 8 + length
                break
            inner += 8 + length + length % 2


def _segment_end(file: BinaryIO) -> int:
    """Where a Matroska file's segment ends; 0 where a live writer could not know."""
    file.seek(0)
    if file.read(4) != _EBML:
        return 0
    length, _ = _vint(file)
    file.seek(length, 1)
    if file.read(4) != _SEGMENT:
        return 0
    length, bits = _vint(file)
    return 0 if length == (1 << bits) - 1 else file.tell() + length


def _vint(file: BinaryIO) -> tuple[int, int]:
    """An EBML number and how many bits it has; all of them set means unknown."""
    first = file.read(1)[0]
    more = 8 - first.bit_length()
    value = int.from_bytes(bytes([first & (0x7F >> more)]) + file.read(more), "big")
    return value, 7 * (more + 1)
