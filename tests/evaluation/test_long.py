"""Seams of long videos: found where they are, and every way is compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FRAMES, tiny_bundle

from cinemo.evaluation.long import FIGURES, WAYS, seam_figures, seams
from cinemo.types import InputError
from pipelines.evaluate import main


def test_where_seams_are() -> None:
    phased, windows, chain = ({"way": way, "overlap": 4} for way in ("phased", "windows", "chain"))
    # Cinemo's 16 frames are a given one and 15 residuals; the others diffuse all 16.
    assert seams(phased, 50, 16, 15) == [16, 31, 46]
    assert seams(phased, 50, 16, 16) == [16, 32, 48]
    assert seams(chain, 50, 16, 16) == [16, 31, 46]
    assert seams(windows, 50, 16, 16) == [12, 24, 34]
    assert seams(windows, 50, 16, 15) == [12, 23, 34, 35]


def embedded(frames_FHWC: np.ndarray) -> torch.Tensor:
    """A point on a circle, by the frame's brightness."""
    angle = torch.from_numpy(frames_FHWC.mean((1, 2, 3))) * 0.05
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_a_cut_is_seen_and_steady_motion_is_none() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (32, 200, 3), np.uint8)
    steady = np.stack([wide[:, k : k + 48] for k in range(40)])
    even = seam_figures(steady, [16, 32], embedded(steady))
    assert even["seam_ratio"] == pytest.approx(1, abs=0.05)
    assert even["seam_ssim_gap"] == pytest.approx(0, abs=0.05)
    assert even["tem_cons_gap"] == pytest.approx(0, abs=0.01)
    smooth = np.repeat(np.linspace(0, 200, 48)[None, :, None], 32, 0).astype(np.uint8).repeat(3, 2)
    parts = [smooth + np.uint8(k) for k in range(16)]
    again = np.stack([*parts, *parts])  # begins where it began
    cut = seam_figures(again, [16], embedded(again))
    assert cut["seam_ratio"] == pytest.approx(15)
    assert cut["seam_ssim_gap"] > 0
    assert cut["largest_jump"] > 7
    assert cut["tem_cons"] == pytest.approx(np.cos(0.05))
    assert cut["tem_cons_gap"] == pytest.approx(np.cos(0.05) - np.cos(15 * 0.05))


def test_every_way_is_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tiny_bundle(tmp_path)
    output = tmp_path / "out"
    command = [
        "--bundle", str(bundle), "--output", str(output), "--long", str(3 * FRAMES), "--limit", "2", "--steps", "5",
        "--device", "cpu",
    ]  # fmt: skip
    main(command)
    found = json.loads((output / "long.json").read_text())
    assert sorted(found["ways"]) == sorted(WAYS)
    for way in found["ways"].values():
        assert sorted(way["figures"]) == sorted(FIGURES)
        assert all(np.isfinite(figure["value"]) for figure in way["figures"].values())
    calls = {name: way["calls"] for name, way in found["ways"].items()}
    assert calls["phased"] == 5 + 1  # 4 of 5 steps are shared, all further segments ask together
    assert calls["phased, noise of the standing picture"] == 5 + 1 + 1
    assert calls["chain"] == 4 * 5
    # Started again it measures what is missing alone; what was measured stays, its seconds too.
    next((output / "parts").glob("long-*-1.npz")).unlink()
    main(command)
    again = json.loads((output / "long.json").read_text())
    kept = [name for name, way in found["ways"].items() if again["ways"][name] == way]
    assert len(kept) == len(WAYS) - 1
    assert {name: way["figures"] for name, way in again["ways"].items()} == {
        name: way["figures"] for name, way in found["ways"].items()
    }
    next((output / "parts").glob("long-*-0.npz")).write_bytes(b"PK")
    with pytest.raises(InputError, match=r"-0\.npz: is damaged .*remove it, it is then measured again"):
        main(command)
    page = (output / "long.html").read_text()
    assert page.count("<video") == 2 * len(WAYS)
    assert all(name in page for name in WAYS)
    for asked, message in (("6", "expected more than 6 frames"), ("20", "at least one picture")):
        with pytest.raises(InputError, match=message):
            main(["--bundle", str(bundle), "--output", str(output), "--long", asked, "--limit", "0"])
