from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from goldens import Golden, Tally, golden_files
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cinemo.media.transforms import cover_crop_geometry, prepare_image
from cinemo.types import InputError


@pytest.mark.golden
def test_golden_image_preparation(say: Callable[[str], None]) -> None:
    tally = Tally("image_prep")
    for golden in map(Golden, golden_files("cinemo/image_prep*.npz")):
        for case in sorted({name.split(".")[0] for name in golden.arrays}):
            image, size = golden.arrays[f"{case}.image"], tuple(golden.arrays[f"{case}.target"].tolist())
            geometry = cover_crop_geometry(*image.shape[:2], size)
            assert [geometry.top, geometry.left] == golden.arrays[f"{case}.crop_top_left"].tolist()
            tally.check(golden, case, "float32", prepare_image(image, size)[None], "out", 1e-6)
    tally.finish(say)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 80), st.integers(1, 80))
def test_the_window_lies_inside_the_resized_picture(h: int, w: int, rows: int, columns: int) -> None:
    size = (8 * rows, 8 * columns)
    geometry = cover_crop_geometry(h, w, size)
    for resized, offset, side in zip(geometry.resized_hw, (geometry.top, geometry.left), size, strict=True):
        assert 0 <= offset <= resized - side
    # One side is covered with about a pixel to spare, and the aspect is kept.
    assert min(r - s for r, s in zip(geometry.resized_hw, size, strict=True)) <= 1


@settings(max_examples=25)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 255))
def test_any_picture_comes_out_in_range_and_size(h: int, w: int, value: int) -> None:
    out_CHW = prepare_image(np.full((h, w, 3), value, np.uint8), (16, 24))
    assert out_CHW.shape == (3, 16, 24)
    torch.testing.assert_close(out_CHW, torch.full_like(out_CHW, value / 127.5 - 1), rtol=0, atol=1e-5)


def test_pil_pictures_of_any_mode() -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    rgb = np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)
    assert torch.equal(prepare_image(grey, (8, 8)), prepare_image(rgb, (8, 8)))


def test_other_arrays_are_refused() -> None:
    with pytest.raises(InputError, match="expected uint8"):
        prepare_image(np.zeros((4, 4, 3), np.float32), (8, 8))
    with pytest.raises(InputError, match="0x5"):
        prepare_image(np.zeros((0, 5, 3), np.uint8), (8, 8))
