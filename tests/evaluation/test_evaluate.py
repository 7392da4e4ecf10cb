"""Evaluation of a random bundle on a small dataset: the files, their figures, and what does not fit together."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from hearing import STRAY
from PIL import Image
from ray.data import DataContext
from tiny import FRAMES, SIZE, tiny_bundle, tiny_longer_bundle, write_dataset

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import check_beside, keep_beside, keep_calibration, load_bundle, read_card
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.evaluation.evaluate import evaluate, sentences
from cinemo.evaluation.figures import contact_sheet, motion_histogram
from cinemo.evaluation.measuring import Plan
from cinemo.evaluation.metrics.frames import motion
from cinemo.evaluation.protocols import PROTOCOLS
from cinemo.evaluation.quality import made
from cinemo.evaluation.scenes import DatasetScenes, Scene, as_given, open_scenes
from cinemo.media.transforms import prepare_image
from cinemo.types import InputError, LatentSample


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"), (FRAMES, 4, SIZE[0] // 8, SIZE[1] // 8))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


def measured(bundle: Path, dataset: Path | str, output: Path, **plan: Any) -> dict[str, Any]:
    small = Plan(**{"limit": 2, "pictures": 2, "values": 3, "steps": 2, **plan})
    return evaluate(str(bundle), str(dataset), str(output), small, device="cpu", say=lambda line: None)


def test_evaluation_writes_its_three_files(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    metrics = measured(bundle, dataset, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert [row["clip"] for row in metrics["per_sample"]] == ["clip-0", "clip-6"]
    assert [row["motion_bucket"] for row in metrics["per_sample"]] == [13, 1]
    psnr = metrics["metrics"]["psnr"]
    assert psnr["value"] == pytest.approx(np.mean([row["psnr"] for row in metrics["per_sample"]]))
    assert psnr["low"] <= psnr["value"] <= psnr["high"]
    assert metrics["metrics"]["fvd"] is None
    told = sentences(metrics)
    interval = f"[{psnr['low']:.4g}, {psnr['high']:.4g}]"
    assert f"PSNR to the real continuation (dB): {psnr['value']:.4g} {interval}" in told
    assert not any("FVD" in line or STRAY.search(line) for line in told)
    assert not any("motion control" in line for line in sentences({**metrics, "motion_spearman": None}))
    assert (metrics["calls_a_video"], metrics["passes_a_video"]) == (2, 4)  # guided in both
    assert metrics["seconds_a_video"] > 0
    assert metrics["protocol"]["videos"] == 2
    assert read_card(bundle).motion.calibration is None
    calibration = json.loads((tmp_path / "calibration.json").read_text())
    keep_calibration(bundle, calibration)
    card = read_card(bundle, full=True)
    assert card.digest == calibration["bundle"]
    assert card.motion.calibration == calibration
    with pytest.raises(InputError, match="the calibration is of 000"):
        keep_calibration(bundle, calibration | {"bundle": "0" * 64})
    assert calibration["values"] == [0, 10, 19]
    assert np.array(calibration["motion"]).shape == (2, 3)
    text = (tmp_path / "README.md").read_text()
    assert f"bundle `{card.digest[:12]}`" in text
    assert f"| PSNR to the real continuation (dB) | {psnr['value']:.4g} |" in text
    assert f"| 19 | {calibration['mean_motion'][2]:.4f} |" in text
    page = (tmp_path / "report.html").read_text()
    assert "not &lt;a&gt; video" in page
    assert 'src="http' not in page
    assert page.count("data:image/png;base64,") == 4
    assert page.count("data:video/mp4;base64,") == 4
    assert "needs --extractor i3d=PLACE: I3D of Kinetics-400" in page


def test_every_video_has_a_noise_of_its_own(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    rows = measured(bundle, dataset, tmp_path, limit=3, pictures=0)["per_sample"]
    assert len({row["seed"] for row in rows}) == 3
    loaded, scene = load_bundle(bundle, "cpu"), open_scenes(str(dataset), 3)[1]
    controls = {"steps": 2, "seed": rows[1]["seed"], **scene.controls(loaded)}
    made = animate(loaded, AnimateRequest(scene.frames(loaded)[0], scene.prompt, **controls))
    assert motion(made.frames_FHWC) == pytest.approx(rows[1]["motion"], abs=1e-9)


def test_clips_longer_than_the_network_makes_are_met_by_videos_as_long(bundle: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "long", (FRAMES + 3, 4, SIZE[0] // 8, SIZE[1] // 8))
    metrics = measured(bundle, dataset, tmp_path / "out", pictures=0, protocol=PROTOCOLS["longer-125"])
    assert metrics["protocol"]["frames"] == FRAMES + 3
    assert f"{FRAMES + 3} frames, not 125" in metrics["protocol"]["departures"]
    assert metrics["metrics"]["psnr"]["videos"] == 2


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_measurement_by_the_protocol_departs_in_nothing(name: str) -> None:
    protocol = PROTOCOLS[name]
    strides = (protocol.frame_stride or 3,) * 2
    folder = protocol.dataset.split()[0].lower()
    asked = (folder, protocol.videos or 9, protocol.frames, strides, protocol.size or (64, 64))
    assert protocol.departures(*asked) == []
    assert protocol.departures("kinetics", *asked[1:], first_frame=False) == [
        f"on kinetics, not {protocol.dataset}",
        "without the given frame, which the paper does not leave out",
    ]


def test_a_stopped_evaluation_goes_on_and_a_longer_one_adds_to_it(
    bundle: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(bundle, dataset, tmp_path / "whole", limit=5)
    calls: list[Any] = []
    stops = [3]

    def counting(work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            calls.append(given)
            if len(calls) in stops:
                stops.clear()
                raise ConnectionError("stopped")
            return work(*given)

        return counted

    monkeypatch.setattr("cinemo.evaluation.measuring.animate", counting(animate))
    monkeypatch.setattr("cinemo.evaluation.measuring.made", counting(made))
    with pytest.raises(ConnectionError):
        measured(bundle, dataset, tmp_path / "parts", limit=5)
    again = measured(bundle, dataset, tmp_path / "parts", limit=5)
    assert again.pop("seconds_a_video") > 0
    assert again == {name: value for name, value in whole.items() if name != "seconds_a_video"}
    assert len(calls) == 3 + (5 - 2) + 2 * 3 + 1  # no finished video again; the last one is timed
    calls.clear()
    measured(bundle, dataset, tmp_path / "parts", limit=5)
    assert not calls
    measured(bundle, dataset, tmp_path / "parts", limit=5, seeds=3)
    assert len(calls) == 2 * 3 * 2, "two seeds more of each picture and value, the first as it was"
    calls.clear()
    measured(bundle, dataset, tmp_path / "parts", limit=5, seed=9)
    assert calls, "videos of another seed are others"


def test_a_damaged_part_is_named(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    measured(bundle, dataset, tmp_path)
    kept = next(path for path in (tmp_path / "parts").rglob("clip-0.npz"))
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"clip-0\*\.npz: is damaged .*remove it, it is then measured again"):
        measured(bundle, dataset, tmp_path)
    kept.write_bytes(whole)
    next((tmp_path / "parts" / "motion").glob("clip-6-*.json")).write_text("[[[1.0, 2.0]]]")
    with pytest.raises(InputError, match=r"clip-6-.*json: is damaged .*expected \(3, 2\)"):
        measured(bundle, dataset, tmp_path)


def test_a_calibration_that_lies_is_not_used(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    right = {
        "bundle": read_card(place).digest, "control": "motion_bucket", "values": [0, 10, 19],
        "mean_motion": [0.1, 0.2, 0.3], "curve": [0.1, 0.2, 0.3], "interval": [[0.0] * 3, [1.0] * 3],
    }  # fmt: skip
    for wrong in ({"curve": [0.1, 0.2]}, {"curve": [0.3, 0.2, 0.1]}, {"curve": "high"}, {"values": [0]}, {}):
        keep_calibration(place, right | wrong)
        assert (read_card(place).motion.calibration is None) == bool(wrong), wrong
    # Of a control that the method has not, or of values beyond its range: the strength goes evenly.
    for other in ({"values": [0, 10, 40]}, {"control": "pace"}):
        request = AnimateRequest(np.zeros((8, 8, 3), np.uint8), "", motion_strength=1.0)
        assert request.settings(read_card(place).recipe, right | other)["motion_bucket"] == 19
    with pytest.raises(InputError, match="a registered version is never changed"):
        keep_beside("models:/cinemo/1", "README.md", b"")


def test_bundles_side_by_side(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    plan = Plan(limit=2, pictures=2, values=2, steps=2, noise=True, protocol=PROTOCOLS["longer-16"])
    said: list[str] = []
    metrics = evaluate(
        str(bundle), str(dataset), str(tmp_path), plan, device="cpu", against=[str(bundle)], say=said.append
    )
    other = metrics["against"][0]
    assert other["metrics"] == metrics["metrics"]
    assert (other["drift"]["motion_ratio"], other["drift"]["has_collapsed"]) == (1, False)
    assert "2 videos, not 1024" in metrics["protocol"]["departures"]
    noise = metrics["initial_noise"]
    assert list(noise) == ["plain noise", "DCTInit, spatial", "DCTInit, 3d", "FFT"]
    jumps = [figures["largest_jump"]["value"] for figures in noise.values()]
    assert len(set(jumps)) == 4, "all differ"
    assert min(jumps) >= 1
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 6
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(each))) for each in re.findall(r"image/png;base64,([^\"]+)", page)
    ]
    rows = 2 * 3  # of each sample what was given and what either bundle made of it
    assert 4 + rows * (round(160 * SIZE[0] / SIZE[1]) + 4) in [picture.height for picture in pictures]
    assert re.search(r"caption 0(; [\w-]+ \(\w{8}\), motion bucket \d+){2}<", page), "asked of both"
    assert "Motion is alive: 100% of the motion of " in page
    assert not [line for line in said if "warning" in line]


def test_samples_are_spread_over_all_shards(dataset: Path) -> None:
    assert [scene.key for scene in DatasetScenes(str(dataset), 3)] == ["clip-0", "clip-3", "clip-6"]
    everything = DatasetScenes(str(dataset), 99)
    assert [scene.key for scene in everything] == [f"clip-{k}" for k in range(7)]
    assert [scene.prompt for scene in everything] == [f"caption {k}" for k in range(7)]
    expected = np.random.default_rng(0).normal(size=(FRAMES, 4, SIZE[0] // 8, SIZE[1] // 8)).astype(np.float16)
    np.testing.assert_array_equal(everything[0].sample.latents_FCHW, expected)


def test_a_clip_without_stored_flow_is_asked_for_at_the_speed_of_its_frames(tmp_path: Path) -> None:
    bundle = load_bundle(str(tiny_longer_bundle(tmp_path)), "cpu")
    latents_FCHW = np.random.default_rng(0).normal(size=(FRAMES, 4, SIZE[0] // 8, SIZE[1] // 8)).astype(np.float16)
    moves = LatentSample("clip", "clip", "", "waves", latents_FCHW, 0.9, 24, 3, 0)
    stands = replace(moves, latents_FCHW=np.repeat(latents_FCHW[:1], FRAMES, 0))
    slow, fast = (Scene("clip", "clip", "waves", each).controls(bundle)["motion_speed"] for each in (stands, moves))
    assert slow < fast
    told = replace(moves, fields={"flow": np.full((FRAMES - 1, 2, 4, 6), 0.5, np.float16)})
    assert Scene("clip", "clip", "waves", told).controls(bundle) == bundle.method.controls_like(bundle.recipe, told)


def test_rendered_pictures_are_measured_on_their_own_kinds(bundle: Path, tmp_path: Path) -> None:
    scenes = open_scenes("rendered:64", 64)
    assert [scene.name for scene in scenes][:5] == ["pan-00", "object-00", "flow-00", "zoom-00", "pan-01"]
    assert len({scene.key for scene in scenes}) == 64
    assert scenes[5].prompt == open_scenes(scenes.location, 64)[5].prompt
    np.testing.assert_array_equal(scenes[5].picture(), open_scenes("rendered:8", 8)[5].picture())

    metrics = measured(bundle, "rendered:8", tmp_path, limit=4, pictures=1)
    assert [row["clip"] for row in metrics["per_sample"]] == ["pan-00", "flow-00", "object-01", "zoom-01"]
    for wrong in ("rendered:", "rendered:0", "rendered:-1", "rendered:all", "rendered:" + "9" * 5000):
        with pytest.raises(InputError, match="such as rendered:64"):
            open_scenes(wrong, 4)


def test_a_folder_of_pictures_is_measured(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    for name, picture_HWC in zip(("a_boat.png", "b.JPG", "c.webp"), pixels, strict=True):
        Image.fromarray(picture_HWC).save(folder / name)
    (folder / "b.txt").write_text("waves\n")
    (folder / "notes.md").write_text("no picture")
    assert [scene.prompt for scene in open_scenes(str(folder), 9)] == ["a boat", "waves", "c"]

    metrics = measured(bundle, folder, tmp_path / "out", limit=3, pictures=2)
    assert [row["clip"] for row in metrics["per_sample"]] == ["a_boat.png", "b.JPG", "c.webp"]
    assert {"psnr", "still_psnr", "motion_of_clip", "latent_frechet", "fvd"} <= {
        name for name, figure in metrics["metrics"].items() if figure is None
    }
    assert {"first_frame_psnr", "motion", "dynamic_degree", "temporal_flickering"} <= {
        name for name, figure in metrics["metrics"].items() if figure is not None
    }
    assert metrics["protocol"]["real_videos"] == "none, pictures alone"
    assert np.array(json.loads((tmp_path / "out/calibration.json").read_text())["motion"]).shape == (2, 3)
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 3
    assert "no real videos" in page

    # Another picture under the same name is measured anew, the others are read.
    Image.fromarray(pixels[1]).save(folder / "a_boat.png")
    again = measured(bundle, folder, tmp_path / "out", limit=3, pictures=2)
    assert again["per_sample"][0] != metrics["per_sample"][0]
    assert again["per_sample"][1:] == metrics["per_sample"][1:]


def test_pictures_that_cannot_be_animated_are_named_before_anything_is_measured(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", SIZE[::-1]).save(folder / "a.png")
    (folder / "c.webp").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"c\.webp: is not a picture"):
        measured(bundle, folder, tmp_path / "out", limit=3)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:40])
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "d.txt").write_text("x" * 5000)
    lines: list[str] = []
    with pytest.raises(InputError, match="3 of 4 pictures cannot be animated, as said above"):
        evaluate(str(bundle), str(folder), str(tmp_path / "out"), Plan(limit=4), say=lines.append)
    for name, line in zip(("b.png", "c.webp", "d.png"), lines, strict=True):
        assert name in line
    assert not list((tmp_path / "out").rglob("*.npz"))


def test_the_given_picture_is_compared_as_the_model_sees_it() -> None:
    """A picture that already has the model's size is still resized by a pixel, as published: both sides of it alike."""
    frames_FHWC = np.random.default_rng(1).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    given_FHWC = as_given(frames_FHWC, SIZE)
    assert given_FHWC.shape == frames_FHWC.shape
    for frame_HWC, seen_HWC in zip(frames_FHWC, given_FHWC, strict=True):
        expected = (prepare_image(frame_HWC, SIZE).permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(seen_HWC - expected).max() <= 0.5 + 1e-4


def test_what_does_not_fit_is_named(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", (FRAMES, 4, 5, 5))
    with pytest.raises(InputError, match="its latents are"):
        evaluate(str(bundle), str(other), str(tmp_path / "out"))
    with pytest.raises(InputError, match="--limit"):
        measured(bundle, dataset, tmp_path / "out", limit=0)
    said: list[str] = []
    with pytest.raises(InputError, match="/nowhere: "):
        evaluate(str(bundle), str(dataset), str(tmp_path / "out"), against=[str(tmp_path / "nowhere")], say=said.append)
    with pytest.raises(InputError, match="--workers is -3"):
        evaluate(str(bundle), str(dataset), str(tmp_path / "out"), workers=-3, say=said.append)
    with pytest.raises(InputError, match="a registered version is never changed"):
        check_beside("models:/cinemo/1")
    assert not said  # before anything was measured
    with pytest.raises(InputError, match="no dataset there"):
        evaluate(str(bundle), str(tmp_path / "nothing"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="neither a dataset"):
        evaluate(str(bundle), str(tmp_path), str(tmp_path / "out"))


def test_the_histogram_counts_every_sample_in_its_bucket(dataset: Path) -> None:
    axes = motion_histogram(DatasetIndex.load(str(dataset))).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert len(heights) == 20
    assert [bucket for bucket, height in enumerate(heights) if height == 1] == [1, 3, 5, 7, 9, 11, 13]
    assert sum(heights) == 7


def test_a_contact_sheet_shows_first_and_last_frame() -> None:
    ramp = np.stack([np.full((32, 48, 3), level, np.uint8) for level in range(0, 160, 10)])
    sheet = np.asarray(contact_sheet([ramp, ramp[::-1]], ["up", "down " * 40], columns=4, cell_width=48))
    row = sheet[20, 200:]
    assert [int(row[k * 52 + 24][0]) for k in range(4)] == [0, 50, 100, 150]
    assert sheet.shape == (2 * 36 + 4, 200 + 4 * 52, 3)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_of_a_cluster_measure_the_same(
    bundle: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a picture takes: Ray is told not to count that as being stuck."""
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 0.2)
    alone = measured(bundle, dataset, tmp_path / "alone", limit=5)
    plan = Plan(limit=5, pictures=2, values=3, steps=2)
    said: list[str] = []
    shared = evaluate(str(bundle), str(dataset), str(tmp_path / "shared"), plan, "cpu", workers=2, say=said.append)
    ray.shutdown()
    assert sum("on 2 workers" in line for line in said) == 5 + 2
    for name, estimate in alone["metrics"].items():
        if estimate is not None:
            assert shared["metrics"][name]["value"] == pytest.approx(estimate["value"], abs=1e-6), name
    assert shared["obedience"] == alone["obedience"]
