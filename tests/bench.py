"""`make bench`: how far each hot path is from its physical limit, as ratios measured in one run; fills BENCHMARKS.md.

Process CPU time of one thread, best of several repeats, on the videos of $CINEMO_CLIPS and on rendered ones.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import load_bundle, save_bundle
from cinemo.data.shards import encode_tar, read_sample
from cinemo.evaluation.metrics import motion, psnr
from cinemo.media.motion import mean_adjacent_ssim
from cinemo.media.synthetic import render_clip, render_clips
from cinemo.media.video import decode_clip, draw_view, probe
from cinemo.methods import build_method
from cinemo.networks.frozen import Vae
from cinemo.networks.weights import load_unet
from cinemo.recipes import load_recipe
from cinemo.types import Clip, ClipError, Condition, LatentBatch, LatentSample

ROOT = Path(__file__).resolve().parent.parent
PAPER, TINY = load_recipe("cinemo-320x512"), load_recipe("cinemo-tiny")


def cpu_seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The best process CPU time of ``work`` after one warm-up."""
    work()
    best = float("inf")
    for _ in range(repeats):
        begun = time.process_time()
        work()
        best = min(best, time.process_time() - begun)
    return best


def videos(scratch: Path) -> list[Path]:
    directory = Path(os.environ.get("CINEMO_CLIPS") or ROOT.parent / "shared" / "clips")
    found = [path for path in sorted(directory.glob("*")) if path.suffix in (".mp4", ".webm", ".avi")]
    if not found:
        render_clips(scratch, 4, size=(360, 640))
        found = sorted(scratch.glob("*.mp4"))
    return found


def linear_decode(path: Path, first: int, last: int) -> None:
    """The limit: decode the span and its keyframe pre-roll in one thread, frames thrown away."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        keys = [
            number
            for number, packet in enumerate(p for p in container.demux(stream) if p.size)
            if packet.is_keyframe and number <= first
        ]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        if keys and keys[-1]:
            start = stream.start_time or 0
            container.seek(start + int(first / stream.average_rate / stream.time_base), stream=stream)
        left = last - (keys[-1] if keys else 0) + 1
        for _ in container.decode(stream):
            left -= 1
            if left <= 0:
                break


def decoding(scratch: Path) -> Iterator[tuple[str, str, str]]:
    """Geometric mean over clips of linear decode time / ours, two plans a clip, 320x512."""
    ratios: dict[str, list[float]] = {}
    for path in videos(scratch):
        for plan in range(2):
            clip = Clip(f"{path.stem}-{plan}", str(path), "")
            try:
                interval, start = draw_view(probe(path).frames, PAPER.data, clip.clip_id, 0)
            except ClipError:
                continue
            limit = cpu_seconds(lambda p=path, s=start, i=interval: linear_decode(p, s, s + 15 * i), 2)
            variants = {
                "decode, resize, crop (PyAV)": (PAPER.data, False),
                "the same with decord": (PAPER.data.model_copy(update={"decoder": "decord"}), False),
                "decode, resize, crop, luma SSIM": (PAPER.data, True),
                "4 views: decode, resize, crop (per view)": (PAPER.data.model_copy(update={"views": 4}), False),
            }
            for name, (data, scored) in variants.items():

                def work(data: object = data, scored: bool = scored, clip: Clip = clip) -> None:
                    for view in decode_clip(clip, data):
                        if scored:
                            mean_adjacent_ssim(view.frames_FHWC)

                try:
                    ratios.setdefault(name, []).append(limit / cpu_seconds(work, 2) * data.views)
                except ClipError as error:
                    print(f"  {name}: {path.name}: {error}")
    for name, values in ratios.items():
        yield name, f"{np.exp(np.mean(np.log(values))):.2f}", f"x linear decode only, {len(values)} plans"


def scoring() -> Iterator[tuple[str, str, str]]:
    frames_FHWC = render_clip(0, 1, (320, 512), frames=16).frames_FHWC
    cv2.setNumThreads(1)
    luma = cpu_seconds(lambda: mean_adjacent_ssim(frames_FHWC))
    rgb = cpu_seconds(lambda: mean_adjacent_ssim(frames_FHWC, "rgb"), 1)
    yield "SSIM luma against kornia RGB", f"{rgb / luma:.1f}", f"x as fast ({luma * 1e3:.0f} ms a clip)"


def shards(scratch: Path) -> Iterator[tuple[str, str, str]]:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(256, 16, 4, 40, 64)).astype(np.float16)
    samples = [
        LatentSample(f"{k:09d}-0", str(k), "s3://x", "a caption", latents[k], 0.5, 24.0, 3, 0) for k in range(256)
    ]
    tar, members = encode_tar(samples)
    path = scratch / "shard.tar"
    raw = cpu_seconds(lambda: path.write_bytes(tar))
    ours = cpu_seconds(lambda: path.write_bytes(encode_tar(samples)[0]))
    yield "shard write", f"{raw / ours:.2f}", f"x raw write ({len(tar) / 1e6:.0f} MB)"
    raw = cpu_seconds(lambda: np.frombuffer(path.read_bytes(), np.uint8).sum())
    data = memoryview(path.read_bytes())
    ours = cpu_seconds(lambda: [read_sample(data, members, k).latents_FCHW.view(np.uint8).sum() for k in range(256)])
    yield "indexed read from a mapped shard", f"{raw / ours:.2f}", "x raw read, every byte touched"


def networks() -> Iterator[tuple[str, str, str]]:
    torch.set_num_threads(1)
    height, width = TINY.data.size
    channels = TINY.model.in_channels
    vae = Vae(TINY.encoders.vae)
    frames = torch.rand(16, 3, height, width) * 2 - 1
    seconds = cpu_seconds(lambda: vae.encode(frames, None))
    yield "tiny VAE encode", f"{1 / seconds:.1f}", "clips/s a core"
    method = build_method(TINY)
    video = torch.randn(4, channels, 16, height // 8, width // 8)
    text = torch.randn(4, 32, TINY.model.cross_attention_dim)
    batch = LatentBatch(video, Condition(video[:, :, 0], text, torch.full((4,), 5.0)))
    noise, t = torch.randn(4, channels, 15, height // 8, width // 8), torch.full((4,), 500)

    def step() -> None:
        method(batch, t, noise).backward()

    yield "tiny UNet forward + backward", f"{4 / cpu_seconds(step):.1f}", "clips/s a core"


def sampling(scratch: Path) -> Iterator[tuple[str, ...]]:
    """Doing less: each option against 50 DDIM steps of the tiny bundle, the same noise, three unseen pictures."""
    unet = load_unet(TINY.model, str(TINY.train.init), torch.float32)
    save_bundle(scratch / "bundle", TINY, unet, {})
    bundle = load_bundle(scratch / "bundle", "cpu")
    calls = {"whole": 0, "outer": 0}
    bundle.method.unet.register_forward_hook(lambda _m, given, _o: calls.update(outer=calls["outer"] + len(given[0])))
    bundle.method.unet.mid_block.resnets[0].register_forward_hook(
        lambda _m, given, _o: calls.update(whole=calls["whole"] + len(given[1]))
    )
    pictures = [render_clip(1004, index, frames=1) for index in (0, 1, 3)]
    options: dict[str, dict[str, Any]] = {
        "DDIM, 50 steps": {},
        "DDIM, 20 steps": {"steps": 20},
        "multistep, 20 steps": {"steps": 20, "solver": "multistep"},
        "guidance in 0.2-0.8 of the noise range": {"guidance_interval": (0.2, 0.8)},
        "deep features at every 2nd step": {"reuse_features": 2},
        "deep features at every 3rd step": {"reuse_features": 3},
        "multistep, 20 steps, guidance in 0.2-0.8": {
            "steps": 20, "solver": "multistep", "guidance_interval": (0.2, 0.8)
        },
    }  # fmt: skip
    reference: list[np.ndarray] = []
    whole_time = 0.0
    for name, option in options.items():
        calls.update(whole=0, outer=0)
        begun = time.process_time()
        made = [
            animate(bundle, AnimateRequest(p.frames_FHWC[0], p.caption, motion_bucket=7, **{"steps": 50, **option}))
            for p in pictures
        ]
        seconds = time.process_time() - begun
        frames = [animation.frames_FHWC for animation in made]
        reference, whole_time = reference or frames, whole_time or seconds
        distance = np.mean([psnr(a[1:], b[1:]) for a, b in zip(reference, frames, strict=True)])
        change = np.mean([motion(b) - motion(a) for a, b in zip(reference, frames, strict=True)])
        count = len(pictures)
        yield (
            name,
            f"{calls['whole'] // count} + {(calls['outer'] - calls['whole']) // count}",
            f"{seconds / whole_time:.2f}",
            "-" if frames is reference else f"{distance:.1f} dB",
            f"{change:+.3f}",
        )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(" | ".join(row).join(("| ", " |")) for row in [head, ("---",) * len(head), *rows])


def replace_section(title: str, text: str) -> None:
    """Write one part of BENCHMARKS.md, up to the next title; a new one goes to the end."""
    path = ROOT / "BENCHMARKS.md"
    before, _, rest = path.read_text().partition(title)
    _, following, after = rest.partition("\n## ")
    path.write_text(f"{before.rstrip()}\n\n{title}\n{text}{following}{after}")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        found = ", ".join(path.name for path in videos(scratch / "clips"))
        rows = [*decoding(scratch / "clips"), *scoring(), *shards(scratch), *networks()]
        limits = table(("what", "value", ""), rows)
        less = table(
            ("sampling", "passes, whole + outer layers", "time", "frames to 50 steps", "motion"), sampling(scratch)
        )
    text = f"{HEADER}Videos: {found}.\n\n{limits}\n\n{SAMPLING}\n{less}\n"
    print(text)
    path = ROOT / "BENCHMARKS.md"
    _, title, rest = path.read_text().partition(NETWORK_TITLE)  # the part of tests/bench_network.py
    path.write_text(f"{text}\n{title}{rest}" if title else text)


HEADER = """# Benchmarks

Made with `make bench`: process CPU time of one thread, best of several repeats, ratios taken in one run. The limit for
decoding is an in-process, one-thread linear decode of the same span and its keyframe pre-roll with frames thrown away;
for shards, writing and reading the same bytes raw.
"""
NETWORK_TITLE = "## The network at full size"
SCALE_TITLE = "## 35 million clips"
SAMPLING = """## Doing less per video

The tiny base bundle, three unseen pictures at bucket 7, guidance 2, the same noise: network passes per video (a guided
step is two; those that reuse deep features run the outer layers alone), time as a share of 50 DDIM steps (encoding and
decoding included), PSNR of frames 2-16 to the result of 50 DDIM steps, and the change of their motion (1 - mean
adjacent SSIM).
"""


if __name__ == "__main__":
    main()
