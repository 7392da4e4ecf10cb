"""`make bench-precompute`: decoding, scoring and shards against their physical limits; its part of BENCHMARKS.md.

Process CPU time on one pinned core; what is compared runs in turns, the best of its repeats counts. On the videos of
$CINEMO_CLIPS (or ../shared/clips, and derived/ in it), else on rendered ones. A few minutes.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from bench import fill, table
from kornia.metrics import ssim as kornia_ssim
from skimage.metrics import structural_similarity

from cinemo import storage
from cinemo.checksums import checksum
from cinemo.config import DataConfig
from cinemo.data.dataset.shards import commit, encode_tar, read_sample
from cinemo.media.guard import Guard
from cinemo.media.motion import mean_adjacent_ssim
from cinemo.media.synthetic import render_clips
from cinemo.media.timeline import Timeline, open_video, read_timeline
from cinemo.media.video import decode_views, draw_view, read_frames
from cinemo.recipes import load_recipe
from cinemo.types import Clip, ClipError, LatentSample

ROOT = Path(__file__).resolve().parent.parent
DATA = load_recipe("cinemo-320x512").data
PLANS, ROUNDS, VIEWS = 2, 3, 4
Row = tuple[str, ...]


def in_turns(*works: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """The best process CPU time of each, one after the other in every round, after one warm-up."""
    best = [float("inf")] * len(works)
    for number in range(rounds + 1):
        for place, work in enumerate(works):
            begun = time.process_time()
            work()
            if number:
                best[place] = min(best[place], time.process_time() - begun)
    return best


def geomean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def videos(scratch: Path) -> list[Path]:
    directory = Path(os.environ.get("CINEMO_CLIPS") or ROOT.parent / "shared" / "clips")
    found = [path for path in sorted(directory.rglob("*")) if path.suffix in (".mp4", ".webm", ".avi", ".mkv")]
    if not found:
        render_clips(scratch, 4, size=(360, 640))
        found = sorted(scratch.glob("*.mp4"))
    return found


def linear_decode(path: Path, timeline: Timeline, first: int, last: int) -> None:
    """The limit: open the file, decode from the keyframe before ``first`` to ``last``, throw the frames away."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        if not timeline.exact:
            for count, _ in enumerate(container.decode(stream)):
                if count == last:
                    return
        keys = [seek for pts, seek in timeline.keys if pts <= timeline.pts[first]]
        container.seek(max(keys, default=0), stream=stream)
        for frame in container.decode(stream):
            if frame.pts is not None and frame.pts >= timeline.pts[last]:
                return


def decord_errors(path: Path, indices: list[int]) -> str:
    """Frames that decord takes for others: those that some neighbour resembles far more than the frame asked for."""
    size, reach = (72, 128), range(-2, 3)
    try:
        got_FHWC = read_frames(path, indices, size, "decord").astype(int)
    except ClipError:
        return "cannot open"
    with open_video(path) as (container, stream):
        count = read_timeline(container, stream, path).frames
    wrong = 0
    for index, got_HWC in zip(indices, got_FHWC, strict=True):
        near = [index + step for step in reach if 0 <= index + step < count]
        errors = np.abs(read_frames(path, near, size).astype(int) - got_HWC).mean((1, 2, 3))
        wrong += bool(errors[near.index(index)] > 1.5 * errors.min() + 1)
    return f"{wrong} of {len(indices)}"


def decoding(paths: Sequence[Path], write_seconds: float) -> tuple[list[Row], list[Row]]:
    """The table of strategies, and that of files; every figure is linear decode time / ours."""
    strategies: dict[str, dict[str, list[float]]] = {}
    files: list[Row] = []
    four = DATA.model_copy(update={"views": VIEWS})
    decord = DATA.model_copy(update={"decoder": "decord"})
    out, outs = (np.empty((views, DATA.frames, *DATA.size, 3), np.uint8) for views in (1, VIEWS))
    for path in paths:
        with open_video(path) as (container, stream):
            timeline, codec = read_timeline(container, stream, path), stream.codec_context
            kind = f"{codec.codec.canonical_name} {codec.width}x{codec.height}"
        found: dict[str, list[float]] = {}
        asked: list[int] = []
        seconds = 0.0
        for plan in range(PLANS):
            clip = Clip(f"{path.stem}-{plan}", str(path), "")
            try:
                spans = [draw_view(timeline.frames, DATA, clip.clip_id, view) for view in range(VIEWS)]
            except ClipError as error:
                print(f"{path.name}: {error}")
                break
            asked += [spans[0][1] + k * spans[0][0] for k in range(0, DATA.frames, 2)]

            def limit(view: int, spans: list[tuple[int, int]] = spans, p: Path = path, t: Timeline = timeline) -> None:
                interval, start = spans[view]
                linear_decode(p, t, start, start + (DATA.frames - 1) * interval)

            def run(data: DataConfig, frames: np.ndarray, score: bool, clip: Clip = clip, p: Path = path) -> None:
                for view in decode_views(p, clip, data, frames):
                    if score:
                        mean_adjacent_ssim(view.frames_FHWC)

            one, all_four, resized, whole, four_whole = in_turns(
                lambda limit=limit: limit(0),
                lambda limit=limit: [limit(view) for view in range(VIEWS)],
                lambda run=run: run(DATA, out, False),
                lambda run=run: run(DATA, out, True),
                lambda run=run: run(four, outs, True),
            )
            seconds += one / PLANS
            ratios = {
                WHOLE: one / (whole + write_seconds),
                FOUR: all_four / (four_whole + VIEWS * write_seconds),
                "decode, resize, crop": one / resized,
            }
            try:
                ratios[DECORD] = one / in_turns(lambda run=run: run(decord, out, False), rounds=1)[0]
            except ClipError as error:
                print(f"{path.name}: {error}")
            for name, ratio in ratios.items():
                found.setdefault(name, []).append(ratio)
        place = "derived" if path.parent.name == "derived" else "clips"
        for name, ratios_of_plans in found.items():
            strategies.setdefault(name, {}).setdefault(place, []).extend(ratios_of_plans)
        if found:
            values = [f"{geomean(found[name]):.2f}" if name in found else "-" for name in (WHOLE, FOUR, DECORD)]
            files.append((path.name, kind, f"{1e3 * seconds:.0f} ms", *values, decord_errors(path, asked)))
            print(*files[-1], flush=True)
    rows = [
        (name, *(f"{geomean(of[place]):.2f}" if place in of else "-" for place in ("clips", "derived")), TARGETS[name])
        for name, of in sorted(strategies.items(), key=lambda entry: list(TARGETS).index(entry[0]))
    ]
    return rows, files


def guarding(paths: Sequence[Path]) -> Iterator[Row]:
    """CPU time of both processes against the same decoding in this one."""
    guard, out = Guard(DATA), np.empty((1, DATA.frames, *DATA.size, 3), np.uint8)
    totals = [0.0, 0.0]
    for path in paths:
        clip = Clip(path.stem, str(path), "")
        best = [float("inf")] * 2
        for number in range(ROUNDS + 1):
            try:
                begun = time.process_time()
                decode_views(path, clip, DATA, out)
                alone = time.process_time() - begun
            except ClipError:
                break
            child = guard.child and cpu_seconds(guard.child.process.pid)
            begun = time.process_time()
            out[0] = guard(path, clip)[0].frames_FHWC
            parent = time.process_time() - begun
            if number and child is not None and guard.child is not None:
                both = parent + cpu_seconds(guard.child.process.pid) - child
                best = [min(best[0], alone), min(best[1], both)]
        if best[0] < float("inf"):
            totals = [total + value for total, value in zip(totals, best, strict=True)]
    yield "guard: decoding beside the worker", f"{100 * (totals[1] / totals[0] - 1):+.1f} %", "< 3 %", "CPU of both"
    usage = os.times().children_user + os.times().children_system
    other = Guard(DATA)
    other(paths[0], Clip("a", str(paths[0]), ""))
    assert other.child is not None
    other.child.end()
    spent = os.times().children_user + os.times().children_system - usage
    yield "guard: starting a child, once a worker", f"{spent:.1f} s", "-", "CPU, a first clip included"


def cpu_seconds(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def scoring(path: Path) -> Iterator[Row]:
    frames_FHWC = decode_views(path, Clip("a", str(path), ""), DATA)[0].frames_FHWC
    luma, rgb = in_turns(lambda: mean_adjacent_ssim(frames_FHWC), lambda: mean_adjacent_ssim(frames_FHWC, "rgb"))
    yield "SSIM luma against kornia RGB", f"{rgb / luma:.1f} x", "14 x", f"{luma * 1e3:.0f} ms a clip"
    luma_FHW = frames_FHWC.astype(np.float64) @ [0.299, 0.587, 0.114]
    reference = np.mean([
        structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
        for a, b in pairwise(luma_FHW)
    ])  # fmt: skip
    ours = mean_adjacent_ssim(frames_FHWC)
    yield "SSIM luma: distance to skimage", f"{abs(ours - reference):.0e}", "1e-05", "the same frames"
    luma_F1HW = torch.from_numpy(luma_FHW / 255)[:, None].float()
    other = float(kornia_ssim(luma_F1HW[:-1], luma_F1HW[1:], 11, padding="valid").double().mean())
    yield "SSIM luma: distance to kornia on luma", f"{abs(ours - other):.0e}", "1e-04", "the same border rule"


def shards(scratch: Path) -> tuple[list[Row], float]:
    """Rows, and the CPU seconds that committing takes for one sample."""
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(256, 16, 4, 40, 64)).astype(np.float16)
    samples = [
        LatentSample(f"{k:09d}-0", str(k), "s3://x", "a caption", latents[k], 0.5, 24.0, 3, 0) for k in range(256)
    ]
    pieces, members = encode_tar(samples)
    tar, place = b"".join(pieces), str(scratch / "shard.tar")
    raw, pieced, committed, hashed = in_turns(
        lambda: storage.write_bytes(place, tar),
        lambda: storage.write_bytes(place, encode_tar(samples)[0]),
        lambda: commit(str(scratch), 0, samples, [], "f"),
        lambda: checksum([tar]),
        rounds=8,
    )
    size = len(tar) / 1e6
    data = memoryview(Path(place).read_bytes())
    read_raw, read = in_turns(
        lambda: np.frombuffer(Path(place).read_bytes(), np.uint8).sum(),
        lambda: [read_sample(data, members, k).latents_FCHW.view(np.uint8).sum() for k in range(256)],
    )
    rows = [
        ("shard write: tar made, written", f"{raw / pieced:.2f} x raw", "0.90", f"{size:.0f} MB: {raw * 1e3:.0f} ms"),
        ("shard commit: with checksum and record", f"{raw / committed:.2f} x raw", "0.45", f"{committed * 1e3:.0f} ms"),
        ("checksum of a shard", f"{hashed / raw:.1f} x raw write", "-", f"{size / hashed / 1e3:.1f} GB/s, BLAKE3"),
        ("indexed read from a mapped shard", f"{read_raw / read:.2f} x raw", "0.75", "every byte touched"),
    ]  # fmt: skip
    return rows, committed / len(samples)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        paths = videos(scratch / "clips")
        shard_rows, write_seconds = shards(scratch)
        strategies, files = decoding(paths, write_seconds)
        rows = [*scoring(paths[0]), *shard_rows, *guarding(paths)]
    text = TEXT.format(
        plans=PLANS,
        strategies=table(("x linear decode", "clips", "derived", "target"), strategies),
        files=table(
            ("file", "", "linear decode", "whole", "4 views", "decord (decode, resize)", "decord: wrong frames"), files
        ),
        rest=table(("what", "value", "target", ""), rows),
    )
    fill(TITLE, text)


WHOLE = "decode, resize, luma SSIM, shard write"
FOUR = f"the same, {VIEWS} views: each view"
DECORD = "decode, resize, crop with decord"
TARGETS = {WHOLE: "0.80", FOUR: "1.60", "decode, resize, crop": "-", DECORD: "-"}
TITLE = "## Precompute, one core"
TEXT = """
Made with `make bench-precompute`: process CPU time on one pinned core, in turns, best of several. The limit for
decoding is to open a file with PyAV and decode the same 16-frame span and its keyframe pre-roll in one thread, frames
thrown away (geometric mean, {plans} plans a file); for shards, writing or reading the same bytes raw (same file, warm
page cache, flushed). More than 1 is possible: frames that nothing refers to are skipped, and an mp4 is opened without
decoding.

{strategies}

{files}

PyAV is the default because it is exact on all of these and the fastest. decord (`--set data.decoder=decord`) is slower;
files that it cannot open (AV1) or would show otherwise than a player (`cinemo/media/video.py`) are decoded by PyAV.

{rest}

What is left: decoding itself takes most of the time of a clip and cannot be skipped where every frame is
referred to (VP8, VP9, AV1, Baseline H.264). A small picture that is enlarged (320x240 AVI) pays for SSIM and scaling at
320x512 whatever its decoder costs. The checksum is paid once per shard, less than a thousandth of what decoding it
took.
"""


if __name__ == "__main__":
    main()
