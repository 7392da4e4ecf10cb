"""Make an archive for ``tests/test_kept.py`` with the entry scripts of the version that is checked out.

``python tests/kept/make.py tests/kept/VERSION.tar.gz``, once for each released version. It holds a dataset of rendered
clips with scores and a stored field, a checkpoint with averaged weights, its bundle, and latents that the bundle made.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PLACE = Path("/tmp/kept")  # written into the recipe of the checkpoint, where the tests look for it
SMALL = [
    *(
        "data.size=[32,48]",
        "data.frames=4",
        "data.clips_per_shard=4",
        "data.scores=true",
        'data.fields=["text_states"]',
    ),
    *(
        "model.in_channels=4",
        "model.out_channels=4",
        "model.block_out_channels=[32]",
        "model.layers_per_block=1",
        "model.norm_num_groups=8",
    ),
    *("model.attention_head_dim=1", "model.cross_attention_dim=32", "model.addition_time_embed_dim=32"),
    *("train.init=null", "train.lanes=2", "train.global_batch=4", "train.micro_batch=2", "train.workers=1"),
    *("train.max_steps=2", "train.ema_decay=0.9", "train.sample_every=0", "train.validate_every=0"),
    *(f"encoders.{name}={PLACE}/encoders/{name}" for name in ("vae", "text_encoder", "tokenizer")),
]


def script(name: str, *flags: object) -> None:
    subprocess.run([sys.executable, ROOT / "pipelines" / f"{name}.py", *map(str, flags)], check=True)


def main(archive: str) -> None:
    from cinemo.animate import AnimateRequest, animate
    from cinemo.bundle import load_bundle
    from cinemo.media.synthetic import render_clips
    from tests.tiny import save_encoders

    shutil.rmtree(PLACE, ignore_errors=True)
    save_encoders(PLACE / "encoders")
    render_clips(PLACE / "clips", 4, seed=0)
    settings = [word for assignment in SMALL for word in ("--set", assignment)]
    script("precompute", "--manifest", PLACE / "clips" / "manifest.jsonl", "--output", PLACE / "dataset", *settings)
    (PLACE / "dataset" / "report.html").unlink()  # no reader needs it
    script("train", "--data", PLACE / "dataset", "--output", PLACE / "run", *settings)
    script("export", "--checkpoint", PLACE / "run", "--output", PLACE / "bundle")
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(picture).save(PLACE / "picture.png")
    made = animate(load_bundle(PLACE / "bundle", "cpu"), AnimateRequest(picture, "waves", motion_bucket=5, seed=3))
    np.savez(PLACE / "latents.npz", latents=made.latents_CFHW, settings=json.dumps(made.settings))
    (checkpoint,) = (PLACE / "run" / "train").glob("checkpoint_*")
    checkpoint.rename(PLACE / "checkpoint")
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("dataset", "checkpoint", "bundle", "picture.png", "latents.npz"):
            tar.add(PLACE / name, name)


if __name__ == "__main__":
    main(*sys.argv[1:])
