"""What a packet's first bytes say about its picture, where the container does not say it."""

from __future__ import annotations

from collections.abc import Iterator

_NON_IDR, _IDR = 1, 5  # types of H.264's slices
# Bytes; FFmpeg's limit for an MPEG-4 picture that only repeats another, as packed B-pictures leave them.
_EMPTY_VOP = 19


def may_hide(codec: str, extradata: bytes) -> bool:
    """Whether some packets of such a stream may show no picture (`is_hidden`, `is_empty`)."""
    # Only what comes out of a transport stream, where units have start codes, was cut into packets by guessing.
    return codec in ("vp8", "vp9", "mpeg4") or (codec in ("h264", "hevc") and extradata[:1] != b"\1")


def is_hidden(codec: str, data: memoryview, extradata: bytes) -> bool:
    """Nothing to show: a reference for other pictures (RFC 6386 section 9.1; VP9 specification, 6.2), or delimiters."""
    if codec == "vp8":
        return not data[0] & 0x10
    if codec == "vp9":
        superframe = data[-1] & 0xE0 == 0xC0
        shows = data[0] & (0x05 if data[0] & 0x30 == 0x30 else 0x0A)  # an earlier picture, or this one
        return not (superframe or shows)
    return codec in ("h264", "hevc") and not _slice(codec, data, extradata)


def is_empty(codec: str, data: memoryview) -> bool:
    """Maybe no picture at all."""
    return codec == "mpeg4" and len(data) <= _EMPTY_VOP


def is_bidirectional(codec: str, data: memoryview, extradata: bytes) -> bool:
    """A B-picture of H.264, MPEG-4 or MPEG-2: one that is shown before a picture that is decoded earlier."""
    if codec == "h264":
        kind, header = _slice(codec, data, extradata) or (0, 0)
        # first_mb_in_slice 0, slice_type 1 or 6, as Exp-Golomb numbers (sections 7.3.3 and 9.1): 1 010, 1 00111
        return kind == _NON_IDR and (header & 0xF0 == 0xA0 or header & 0xFC == 0x9C)
    if codec == "mpeg4":
        place = bytes(data).find(b"\0\0\1\xb6")
        return 0 <= place < len(data) - 4 and data[place + 4] >> 6 == 2
    if codec == "mpeg2video":
        place = bytes(data).find(b"\0\0\1\0")
        return 0 <= place < len(data) - 5 and data[place + 5] >> 3 & 7 == 3
    return False


def decoding_begins(codec: str, data: memoryview, extradata: bytes) -> bool:
    """Whether a keyframe is all that a decoder needs; from H.264's recovery points it gets whole little by little."""
    return codec != "h264" or (_slice(codec, data, extradata) or (0, 0))[0] == _IDR


def _slice(codec: str, data: memoryview, extradata: bytes) -> tuple[int, int] | None:
    """Type and first byte of a packet's first coded slice of H.264 or HEVC, if it has one."""
    for place in _units(codec, data, extradata):
        if place + 1 >= len(data):
            break
        kind = data[place] & 31 if codec == "h264" else data[place] >> 1 & 63
        if 1 <= kind <= 5 if codec == "h264" else kind < 32:
            return kind, data[place + 1]
    return None


def _units(codec: str, data: memoryview, extradata: bytes) -> Iterator[int]:
    """Where a packet's units begin: behind their lengths (ISO/IEC 14496-15), or behind start codes (annex B)."""
    if extradata[:1] == b"\1":
        size = (extradata[4 if codec == "h264" else 21] & 3) + 1
        place = size
        while place < len(data):
            yield place
            place += int.from_bytes(data[place - size : place], "big") + size
    else:
        content = bytes(data)
        place = content.find(b"\0\0\1")
        while 0 <= place < len(content) - 3:
            yield place + 3
            place = content.find(b"\0\0\1", place + 3)
