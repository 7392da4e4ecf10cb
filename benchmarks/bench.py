"""`make bench`: the tiny networks, and what doing less per video costs and saves; their parts of BENCHMARKS.md.

Process CPU time of one thread, best of several repeats. `make bench-precompute` and `make bench-network` fill the rest.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import load_bundle, save_bundle
from cinemo.evaluation.metrics.frames import motion, psnr
from cinemo.media.synthetic import render_clip
from cinemo.methods import build_method
from cinemo.networks.frozen import Vae
from cinemo.networks.weights import load_unet
from cinemo.recipes import load_recipe
from cinemo.types import Condition, LatentBatch

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
    batch = LatentBatch(video, Condition(image=video[:, :, 0], text=text, motion_bucket=torch.full((4,), 5.0)))
    noise, t = torch.randn(4, channels, 15, height // 8, width // 8), torch.full((4,), 500)

    def step() -> None:
        method(batch, t, noise).backward()

    yield "tiny UNet forward + backward", f"{4 / cpu_seconds(step):.1f}", "clips/s a core"


def sampling(scratch: Path) -> Iterator[tuple[str, ...]]:
    """Doing less: each option against 50 DDIM steps of the tiny bundle, the same noise, three unseen pictures."""
    unet = load_unet(TINY.model, str(TINY.train.init), torch.float32)
    save_bundle(scratch / "bundle", TINY, {"unet": unet}, {})
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
            animate(
                bundle,
                AnimateRequest(
                    p.frames_FHWC[0], p.caption, motion_bucket=7, guidance_scale=2, **{"steps": 50, **option}
                ),
            )
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


def fill(title: str, text: str, page: str = "BENCHMARKS.md") -> None:
    """Replace the section of a page that begins with the line ``title``, or append it."""
    print(f"{title}\n{text}\n")
    path = ROOT / page
    before, found, after = path.read_text().partition(f"{title}\n")
    rest = after[after.index("\n## ") :] if found and "\n## " in after else ""
    path.write_text(f"{before.rstrip()}\n\n{title}\n{text.rstrip()}\n{rest}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        less = table(
            ("sampling", "passes, whole + outer layers", "time", "frames to 50 steps", "motion"),
            sampling(Path(directory)),
        )
    for title, text in (
        (TINY_TITLE, table(("what", "value", ""), networks())),
        (SAMPLING_TITLE, f"{SAMPLING}\n{less}"),
    ):
        print(f"{title}\n{text}\n")
        fill(title, f"\n{text}")


TINY_TITLE = "## The tiny recipe's networks, one core"
NETWORK_TITLE = "## The network at full size"
SCALE_TITLE = "## 35 million clips"
SAMPLING_TITLE = "## Doing less per video"
SAMPLING = """
The tiny base bundle, three unseen pictures at bucket 7, guidance 2, the same noise: network passes per video (a guided
step is two; those that reuse deep features run the outer layers alone), time as a share of 50 DDIM steps (encoding and
decoding included), PSNR of frames 2-16 to the result of 50 DDIM steps, and the change in their motion (1 - mean
adjacent SSIM).
"""


if __name__ == "__main__":
    main()
