"""Pictures from strangers: what is recognised, what is refused before it is decoded, and what is left of the rest."""

from __future__ import annotations

import io
import re
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, PngImagePlugin

from cinemo.animate import load_image
from cinemo.serving.http.refusals import Refused
from cinemo.serving.http.uploads import cleaned, data_url, read_header

PIXELS = 1_000_000


def noise(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    written = io.BytesIO()
    image.save(written, form, **options)
    return written.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def hollow_png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that says it is large and holds next to nothing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body or zlib.compress(b"\0")) + chunk(b"IEND", b"")


def hollow_webp(width: int, height: int, flags: int = 0) -> bytes:
    body = bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    riff = b"WEBPVP8X" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(riff)) + riff


def hollow_jpeg(width: int, height: int) -> bytes:
    frame = struct.pack(">HBHHB", 17, 8, height, width, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
    return b"\xff\xd8\xff\xe0\0\x04ab\xff\xff\xc0" + frame + b"\xff\xd9"


def refusal(content: bytes, declared: str | None = None, pixels: int = PIXELS) -> tuple[int, str]:
    with pytest.raises(Refused) as caught:
        cleaned(content, declared, pixels)
    assert caught.value.fault.param == "input_reference"
    return caught.value.status, caught.value.fault.code


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("declared", [None, "", "image/png", "image/jpeg; q=1", "application/octet-stream"])
def test_pictures_are_taken_by_content_and_keep_their_pixels(form: str, declared: str | None) -> None:
    content = encoded(noise(), form)
    kept = cleaned(content, declared, PIXELS)
    assert read_header(kept).format == "PNG"
    np.testing.assert_array_equal(load_image(kept), load_image(content))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_kind_of_png_becomes_rgb(mode: str) -> None:
    source = Image.fromarray(np.full((9, 12), 3000, np.uint16)) if mode == "I;16" else noise(12, 9).convert(mode)
    kept = cleaned(encoded(source), None, PIXELS)
    with Image.open(io.BytesIO(kept)) as image:
        assert (image.mode, image.size, image.format) == ("RGB", (12, 9), "PNG")
    np.testing.assert_array_equal(load_image(kept), load_image(encoded(source)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_and_all_metadata_is_gone(form: str, orientation: int) -> None:
    upright = Image.new("RGB", (64, 32), "blue")
    ImageDraw.Draw(upright).rectangle((0, 0, 15, 15), "red")  # red in the upper left corner
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }.get(orientation, [])  # fmt: skip
    sent = upright
    for step in undo:
        sent = sent.transpose(step)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9286] = orientation, "SecretMaker", "SecretComment"
    exif[0x8825] = {1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 18.0), 29: "SecretGps"}
    options: dict[str, object] = {"exif": exif, "icc_profile": b"SecretProfile" * 20}
    if form == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", "SecretText")
        options["pnginfo"] = text
    content = encoded(sent, form, **options) + b"SecretTrailer"
    assert content.count(b"Secret") > 4
    kept = cleaned(content, None, PIXELS)
    assert b"Secret" not in kept
    with Image.open(io.BytesIO(kept)) as image:
        assert not image.getexif()
        assert not image.info
        assert image.size == (64, 32)
        red, blue = image.getpixel((4, 4)), image.getpixel((60, 28))
    assert isinstance(red, tuple)
    assert isinstance(blue, tuple)
    assert red[0] > 180 > 80 > red[2]
    assert blue[2] > 180 > 80 > blue[0]
    chunks = {kept[at + 4 : at + 8] for at in _chunk_starts(kept)}
    assert chunks == {b"IHDR", b"IDAT", b"IEND"}


def _chunk_starts(png: bytes) -> list[int]:
    starts, at = [], 8
    while at < len(png):
        starts.append(at)
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return starts


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"hello", "not a picture"),
        (b"GIF89a" + b"\1\0\1\0\0\0\0", "GIF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\n <?xml version='1.0'?><svg/>", "SVG"),
        (b"%PDF-1.7", "PDF"),
        (b"<!DOCTYPE html><script>alert(1)</script>", "HTML"),
        (b"PK\3\4" + b"\0" * 40, "ZIP"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (encoded(Image.new("RGB", (9, 9)), "BMP"), "BMP"),
        (encoded(Image.new("RGB", (9, 9)), "TIFF"), "TIFF"),
        (b"<!-- " + encoded(noise()), "not a picture"),
    ],
)
def test_other_types_are_refused_by_content_whatever_they_are_declared_as(content: bytes, what: str) -> None:
    for declared in (None, "image/png"):
        with pytest.raises(Refused, match=what) as caught:
            cleaned(content, declared, PIXELS)
        assert caught.value.status == 415


@pytest.mark.parametrize("declared", ["text/html", "image/svg+xml", "image/gif", "application/pdf", "x" * 9000])
def test_a_declared_type_that_is_not_served_is_refused_whatever_the_content(declared: str) -> None:
    assert refusal(encoded(noise()), declared) == (415, "unsupported_image")


def test_a_page_behind_a_picture_does_not_survive() -> None:
    kept = cleaned(encoded(noise(), "JPEG", comment=b"<script>x</script>") + b"<script>y</script>", None, PIXELS)
    assert b"<script>" not in kept


@pytest.mark.parametrize(
    "content",
    [
        hollow_png(60_000, 60_000),
        hollow_png(2**31 - 1, 2**31 - 1),
        hollow_jpeg(65_535, 65_535),
        hollow_webp(2**24, 256),
        encoded(Image.new("RGB", (2000, 600)), "WEBP"),
        encoded(Image.new("RGB", (2000, 600)), "WEBP", lossless=True),
        encoded(Image.new("L", (2000, 600)), "PNG"),
        encoded(Image.new("L", (600, 2000)), "JPEG"),
    ],
    ids=["png-60000", "png-largest", "jpeg", "webp-canvas", "webp", "webp-lossless", "png", "jpeg-real"],
)
def test_too_many_pixels_are_refused_before_decoding(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoder(*_: object, **__: object) -> None:
        raise AssertionError("was opened")

    monkeypatch.setattr(Image, "open", decoder)
    assert refusal(content) == (413, "image_too_large")


def test_a_small_header_before_a_flood_of_data_costs_little() -> None:
    flood = hollow_png(100, 100, zlib.compress(b"\0" * 300_000_000, 9))
    assert len(flood) < 400_000
    began = time.process_time()
    cleaned(flood, None, PIXELS)  # what the picture's size asks for is read, the rest is not
    assert time.process_time() - began < 1


def test_a_bomb_of_text_is_refused() -> None:
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 200_000_000, 9))
    png = encoded(noise())
    assert refusal(png[:33] + text + png[33:]) == (422, "invalid_image")


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    progressive = encoded(noise(), "JPEG", progressive=True)
    cleaned(progressive, None, PIXELS)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    assert refusal(progressive[:-2] + scan * 100 + b"\xff\xd9") == (422, "invalid_image")


def test_animations_are_refused() -> None:
    frames = [noise(), noise().transpose(Image.Transpose.ROTATE_180)]
    for form in ("PNG", "WEBP"):
        moving = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert refusal(moving) == (415, "unsupported_image")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_cut_pictures_are_refused(form: str) -> None:
    content = encoded(noise(), form)
    for length in (12, 20, 30, len(content) // 2, len(content) - 200):
        assert refusal(content[:length])[0] in (415, 422)


@pytest.mark.parametrize("size", [(7, 90), (90, 7), (170, 8)])
def test_slivers_are_refused(size: tuple[int, int]) -> None:
    assert refusal(encoded(noise(*size))) == (422, "invalid_image")


def test_a_header_that_contradicts_the_decoder_is_refused() -> None:
    # The decoder takes the last of two frame headers' sizes; what is measured is the first.
    content = bytearray(encoded(Image.new("RGB", (64, 64)), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"))
    content[24:27] = (99).to_bytes(3, "little")
    assert refusal(bytes(content)) == (422, "invalid_image")


@settings(max_examples=300)
@given(st.data(), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_damage_is_a_refusal_or_a_picture_never_another_fault(data: st.DataObject, form: str) -> None:
    content = bytearray(encoded(noise(16, 12), form))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    kept, refused = outcome(bytes(content))
    if refused is None:
        assert read_header(kept).width * read_header(kept).height <= 100_000
    else:
        assert refused.status in (413, 415, 422)
        assert not re.search(r"\b0x", refused.fault.message)  # no address; sizes such as 3600x12 are fine


def outcome(content: bytes) -> tuple[bytes, Refused | None]:
    try:
        return cleaned(content, None, 100_000), None
    except Refused as refused:
        return b"", refused


@settings(max_examples=300)
@given(st.binary(max_size=64), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8X"]))
def test_any_bytes_are_refused_as_bytes_can_be(tail: bytes, head: bytes) -> None:
    with pytest.raises(Refused) as caught:
        cleaned(head + tail, None, PIXELS)
    assert caught.value.status in (413, 415, 422)


def test_data_urls() -> None:
    assert data_url("data:image/png;base64,aGVsbG8=") == (b"hello", "image/png")
    for bad in ("data:", "data:image/png,abc", "data:image/png;base64,%%%", "data:;base64"):
        with pytest.raises(Refused) as caught:
            data_url(bad)
        assert caught.value.status == 422
