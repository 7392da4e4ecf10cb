"""Pictures that strangers send: recognised by their content, measured before anything is decoded, then made anew.

What a job keeps is a PNG that this module wrote: upright, RGB, without EXIF, GPS, colour profile, comments or anything
behind the picture's end. Its pixels are those that `cinemo.animate.load_image` reads from the original.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from dataclasses import dataclass

from PIL import Image

from cinemo.animate import load_image
from cinemo.serving.http.refusals import Refused
from cinemo.types import InputError

PARAM = "input_reference"
FORMATS = ("PNG", "JPEG", "WEBP")
# What a client may declare. Which of the pictures it really is, its content says: files with the wrong ending are
# common and do no harm.
TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp", "application/octet-stream", "binary/octet-stream")
_EXPECTED = "expected a PNG, JPEG or WebP picture"
# A progressive JPEG has about ten scans; every one costs a pass over the whole picture, however few bytes it has.
_MAX_SCANS = 64
_OTHERS = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"%PDF", "a PDF"),
    (b"PK\3\4", "a ZIP archive"),
    (b"<svg", "an SVG"),
    (b"<?xml", "an XML or SVG document"),
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
)


@dataclass(frozen=True)
class Header:
    """What a picture's first bytes say, without a decoder: its format, width and height in pixels."""

    format: str
    width: int
    height: int
    animated: bool = False


def cleaned(content: bytes, declared: str | None, max_pixels: int) -> bytes:
    """The upright picture without metadata, as PNG.

    Args:
        content: as it was sent.
        declared: the content type that came with it; None or empty: none did.
        max_pixels: refused above, before anything is decoded.

    Raises:
        Refused: 415 another type or animated, 413 too many pixels, 422 damaged, too thin or too small.
    """
    kind = (declared or "").partition(";")[0].strip().lower()
    if kind and kind not in TYPES:
        raise _wrong_type(f"input_reference is declared as {kind[:64]!r}")
    header = read_header(content)
    if header.width * header.height > max_pixels:
        size = f"{header.width}x{header.height}"
        message = f"the picture has {size} pixels, expected at most {max_pixels / 1e6:g} megapixels; scale it down"
        raise Refused(413, "image_too_large", message, PARAM)
    if header.animated:
        raise _wrong_type("input_reference is animated", "expected one picture")
    if header.format == "JPEG" and content.count(b"\xff\xda") > _MAX_SCANS:
        raise _damaged(f"the JPEG has more than {_MAX_SCANS} scans; save it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # measured above
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                agreed = picture.size == (header.width, header.height)
                frames = 1 if header.format == "JPEG" else getattr(picture, "n_frames", 1)
            if not agreed:
                raise _damaged("its header contradicts itself; save it again")
            if frames > 1:
                raise _wrong_type("input_reference is animated", "expected one picture")
            pixels_HWC = load_image(content, max_pixels)
            written = io.BytesIO()
            Image.fromarray(pixels_HWC).save(written, "PNG", compress_level=1)
    except InputError as error:
        raise _damaged(str(error).removeprefix("image: ")) from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        raise _damaged("it is damaged; save it again") from None
    return written.getvalue()


def read_header(content: bytes) -> Header:
    """Recognise a picture by its first bytes.

    Raises:
        Refused: 415 it is none of the three formats, 422 it is one but its header is broken or cut.
    """
    try:
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(content)
        if content.startswith(b"\xff\xd8\xff"):
            return _jpeg(content)
        if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            return _webp(content)
    except IndexError:
        raise _damaged("it ends within its header") from None
    start = content[:256].lstrip().lower()
    names = [name for magic, name in _OTHERS if start.startswith(magic.lower())]
    if content[4:8] == b"ftyp":
        names = ["an HEIC, AVIF or MP4 file"]
    raise _wrong_type(f"input_reference is {names[0] if names else ('not a picture' if content else 'empty')}")


def data_url(url: str) -> tuple[bytes, str]:
    """The content and declared type of a ``data:`` URL in base64. Raises `Refused` (422)."""
    head, comma, body = url.removeprefix("data:").partition(",")
    kind, *options = head.split(";")
    if not comma or "base64" not in options:
        raise Refused(422, "invalid_url", "input_reference: expected data:image/png;base64,...", PARAM)
    try:
        return base64.b64decode(body, validate=True), kind
    except (binascii.Error, ValueError):
        raise Refused(422, "invalid_url", "input_reference: the data URL is not base64", PARAM) from None


def _png(content: bytes) -> Header:
    if len(content) < 33 or content[12:16] != b"IHDR":
        raise _damaged("it ends within its header")
    return Header("PNG", _big(content, 16, 4), _big(content, 20, 4))


def _jpeg(content: bytes) -> Header:
    """Walk the segments to the start of frame (ITU T.81, annex B)."""
    at = 2
    while True:
        while content[at] == 0xFF:  # a marker, after any number of fill bytes
            at += 1
        marker = content[at]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            _ = content[at + 7]
            return Header("JPEG", _big(content, at + 6, 2), _big(content, at + 4, 2))
        if marker in (0xD8, 0xD9, 0xDA, 0x00):
            raise _damaged("it has no start of frame")
        at += 1 + max(2, _big(content, at + 1, 2))
        if content[at] != 0xFF:
            raise _damaged("its segments are not contiguous")


def _webp(content: bytes) -> Header:
    """The three kinds of first chunk (RFC 9649)."""
    chunk = content[12:16]
    if chunk == b"VP8X":
        _ = content[29]
        return Header("WEBP", _little(content, 24, 3) + 1, _little(content, 27, 3) + 1, bool(content[20] & 2))
    if chunk == b"VP8L":
        _ = content[24]
        bits = _little(content, 21, 4)
        return Header("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if chunk == b"VP8 ":
        _ = content[29]
        return Header("WEBP", _little(content, 26, 2) & 0x3FFF, _little(content, 28, 2) & 0x3FFF)
    raise _damaged("its first chunk is unknown")


def _big(content: bytes, at: int, count: int) -> int:
    return int.from_bytes(content[at : at + count], "big")


def _little(content: bytes, at: int, count: int) -> int:
    return int.from_bytes(content[at : at + count], "little")


def _wrong_type(what: str, expected: str = _EXPECTED) -> Refused:
    return Refused(415, "unsupported_image", f"{what}; {expected}", PARAM)


def _damaged(why: str) -> Refused:
    return Refused(422, "invalid_image", f"input_reference: the picture cannot be used: {why}", PARAM)
