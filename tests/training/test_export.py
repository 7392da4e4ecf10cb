"""A bundle holds exactly what was trained, whatever the ZeRO stage; published weights come in by name."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cinemo import storage
from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import load_bundle
from cinemo.config import Recipe
from cinemo.methods import build_method, mark_trainable
from cinemo.methods.cinemo import CinemoMethod, CinemoTrain
from cinemo.networks.lavie_unet import LavieUNet, is_temporal
from cinemo.networks.weights import load_unet, save_network
from cinemo.recipes import override
from cinemo.recipes.cinemo import cinemo_320x512
from cinemo.training.checkpoint import checkpoints, export, shares
from cinemo.training.checkpoint.shares import WEIGHT, Fragment
from cinemo.training.run.averaging import EMA
from cinemo.training.run.batch import host_batch
from cinemo.training.run.engine import Engine
from cinemo.types import Condition, InputError, LatentBatch
from tests.training.conftest import moving_samples, sizes
from tests.training.ranks import made_engine, train_steps

ROOT = Path(__file__).resolve().parents[2]


def _checkpoint(recipe: Recipe, output: Path, **train: object) -> tuple[CinemoMethod, Recipe]:
    """A stored checkpoint after one step on this process, and the method as it then was."""
    recipe = recipe.model_copy(update={"train": CinemoTrain(**(recipe.train.model_dump() | train))})
    torch.manual_seed(0)
    method = build_method(recipe)
    mark_trainable(method, recipe.train)
    engine = Engine(method, recipe.train, torch.device("cpu"))
    for start in (0, 2):
        host = host_batch(moving_samples(4)[start : start + 2], 0, recipe)
        text = torch.zeros(2, 3, recipe.model.cross_attention_dim)
        batch = LatentBatch(
            host.video_BCFHW, Condition(image=host.video_BCFHW[:, :, 0], text=text, motion_bucket=host.bucket_B)
        )
        engine.step(engine.loss(batch, host.t_B, host.noise_BCFHW).mean())
    directory = output / checkpoints.RUN / "checkpoint_2030-01-01_00-00-00.000001"
    directory.mkdir(parents=True)
    engine.snapshot({"step": 1}).write(directory)
    checkpoints.describe(directory, recipe, 1, 1, "digest", sizes(directory))
    return method, recipe


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_a_bundle_holds_what_was_trained(small: Recipe, tmp_path: Path, stage: int, precision: str) -> None:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    method, recipe = _checkpoint(small, tmp_path / "run", zero_stage=stage, precision=precision)
    line = export.from_checkpoint(str(tmp_path / "run"), str(tmp_path / "bundle"))
    assert "of step 1 (cinemo-tiny)" in line
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.recipe.model == recipe.model
    with GatheredParameters(list(method.parameters()), enabled=stage == 3):
        trained = {name: value.detach().clone() for name, value in method.unet.named_parameters()}
    exported = dict(bundle.method.unet.named_parameters())
    assert exported.keys() == trained.keys()
    for name, value in trained.items():
        assert exported[name].dtype == torch.float32
        assert torch.equal(exported[name].to(value.dtype), value), name
    torch.manual_seed(0)
    fresh = build_method(recipe).unet
    assert not torch.equal(fresh.conv_in.weight, bundle.method.unet.conv_in.weight)
    for name, value in fresh.named_buffers():
        assert torch.equal(dict(bundle.method.unet.named_buffers())[name], value), "a formula that training rounded"


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_lora_is_exported_merged_and_alone(
    small: Recipe, tmp_path: Path, stage: int, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {"trainable": "lora", "lora_rank": 2, "lora_alpha": 8, "lora_layers": ("to_q", "ff.net.2"), "lr": 0.1}
    _, recipe = _checkpoint(small, tmp_path / "run", zero_stage=stage, precision=precision, **lora)
    main = runpy.run_path(str(ROOT / "pipelines/export.py"))["main"]
    main(["--checkpoint", str(tmp_path / "run"), "--adapter", "--output", str(tmp_path / "adapter")])
    assert "adapter of rank 2 on " in capsys.readouterr().out
    main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "bundle")])

    unet = load_bundle(tmp_path / "bundle").method.unet
    torch.manual_seed(0)
    base = build_method(recipe).unet.state_dict()
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    moved = set()
    for name, value in unet.state_dict().items():
        kept = base[name] if precision == "fp32" or name.endswith("freqs") else base[name].bfloat16().float()
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in stored:
            update = stored[f"{key}.lora_B.weight"] @ stored[f"{key}.lora_A.weight"]
            torch.testing.assert_close(value, kept + 8 / 2 * update)
            moved |= {name} if update.any() else set()
        else:
            assert torch.equal(value, kept), name
    # The text was zero, and so are the temporal branches' last weights: their queries have no gradient yet.
    assert moved == {name for name in base if name.endswith(("attn1.to_q.weight", "ff.net.2.weight"))}
    assert len(stored) == 4 * len(moved)

    with pytest.raises(InputError, match="is not empty; choose another"):
        main(["--checkpoint", str(tmp_path / "run"), "--adapter", "--output", str(tmp_path / "adapter")])
    with pytest.raises(InputError, match="--adapter: only a --checkpoint has one"):
        main(["--from-lavie", "x.pt", "--adapter", "--output", str(tmp_path / "other")])


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_does_not_learn_keeps_its_bits(small: Recipe, tmp_path: Path, stage: int) -> None:
    _, recipe = _checkpoint(small, tmp_path / "run", zero_stage=stage, trainable="temporal")
    export.from_checkpoint(str(tmp_path / "run"), str(tmp_path / "bundle"))
    torch.manual_seed(0)
    base = build_method(recipe).unet.state_dict()
    for name, value in load_bundle(tmp_path / "bundle").method.unet.state_dict().items():
        if not is_temporal(name):
            assert torch.equal(value, base[name]), name
        elif name.endswith("attn_temp.to_out.0.weight"):
            assert value.any(), name  # zero before the first step
    with pytest.raises(InputError, match=r"train\.trainable is temporal, expected lora; export a bundle"):
        export.adapter_from_checkpoint(str(tmp_path / "run"), str(tmp_path / "adapter"))


@pytest.mark.usefixtures("process_group")
def test_averaged_weights_are_exported_where_there_are_any(small: Recipe, tmp_path: Path) -> None:
    settings = {"ema_decay": 0.5, "max_steps": 9}
    recipe = small.model_copy(update={"train": CinemoTrain(**(small.train.model_dump() | settings))})
    engine = made_engine(recipe)
    expected: dict[str, Tensor] = {}
    for n in range(1, 5):
        train_steps(engine, recipe, range(n - 1, n))
        share = min(0.5, (n - 1) / (n + 8))
        for name, value in engine.method.unet.named_parameters():
            expected[name] = share * expected.get(name, torch.zeros(())) + (1 - share) * value.detach()
    directory = tmp_path / "run" / checkpoints.RUN / "checkpoint_2030-01-01_00-00-00.000001"
    directory.mkdir(parents=True)
    engine.snapshot({"step": 4}).write(directory)
    checkpoints.describe(directory, recipe, 4, 1, "digest", sizes(directory))
    export.from_checkpoint(str(tmp_path / "run"), str(tmp_path / "bundle"))
    bundle = load_bundle(tmp_path / "bundle")
    for name, value in bundle.method.unet.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(bundle.method.unet.conv_in.weight, engine.method.unet.conv_in.weight)


MEMORY = """
import sys, torch
from pathlib import Path
from cinemo.networks.frozen import TextEncoder, Vae
from cinemo.training.checkpoint import export
def peak(what):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(what)) * 1024
torch.nn.Linear(8, 8)(torch.zeros(8, 8))
Vae("package:tiny/vae"), TextEncoder("package:tiny/text_encoder", "package:tiny/tokenizer")  # libraries apart
before = peak("VmRSS")
export.from_checkpoint(*sys.argv[1:])
print(peak("VmHWM") - before)
"""


@pytest.mark.slow
def test_export_holds_the_model_once(small: Recipe, tmp_path: Path) -> None:
    """Of a checkpoint four times as large, in two shares, by a process of its own."""
    model = small.model.model_copy(update={"block_out_channels": (192, 384)})
    train = CinemoTrain(**(small.train.model_dump() | {"ema_decay": 0.9}))
    recipe = small.model_copy(update={"model": model, "train": train})
    unet = LavieUNet(**model.model_dump())
    size = sum(value.nbytes for value in unet.parameters())
    assert size > 64 * 2**20
    directory = tmp_path / "run" / checkpoints.RUN / "checkpoint_2030-01-01_00-00-00.000001"
    directory.mkdir(parents=True)
    keys = (WEIGHT, "exp_avg", "exp_avg_sq", EMA)
    whole = [
        Fragment(f"unet.{name}", tuple(value.shape), 0, dict.fromkeys(keys, value.detach().view(-1)))
        for name, value in unet.named_parameters()
    ]
    for rank, record in enumerate([{"adam_steps": 1, "schedule_steps": 1, "client": {}}, None]):
        shares.Snapshot(rank, [fragment.part(rank, 2) for fragment in whole], record).write(directory)
    checkpoints.describe(directory, recipe, 1, 2, "digest", sizes(directory))
    words = [sys.executable, "-c", MEMORY, str(directory), str(tmp_path / "bundle")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    more = int(done.stdout.split()[-1]) / size
    print(f"{more:.2f} x the weights ({size / 2**20:.0f} MiB)")
    assert more < 1.4
    assert torch.equal(load_unet(model, str(tmp_path / "bundle" / "unet")).conv_in.weight, unet.conv_in.weight)
    shutil.rmtree(directory)


@pytest.mark.usefixtures("process_group")
def test_what_is_not_a_checkpoint_is_refused(small: Recipe, tmp_path: Path) -> None:
    _checkpoint(small, tmp_path / "run")
    output = str(tmp_path / "bundle")
    with pytest.raises(InputError, match="none there"):
        export.from_checkpoint(str(tmp_path), output)
    with pytest.raises(InputError, match="expected a local directory"):
        export.from_checkpoint(str(tmp_path / "run"), "s3://bucket/bundle")
    (directory,) = checkpoints.stored(str(tmp_path / "run"))
    next((Path(directory) / "state").glob("rank-*")).write_bytes(b"cut")
    with pytest.raises(InputError, match="incomplete"):
        export.from_checkpoint(directory, output)
    with pytest.raises(InputError, match="none there"):
        export.from_checkpoint(str(tmp_path / "run"), output)
    assert not Path(output).exists()


def _published(small: Recipe, root: Path) -> LavieUNet:
    torch.manual_seed(1)
    unet = build_method(small).unet
    save_network(unet, root / "unet")
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(getattr(small.encoders, name), root / name)
    shutil.copytree(small.encoders.vae, root / "vae_temporal_decoder")
    return unet


def test_published_cinemo_weights(small: Recipe, tmp_path: Path) -> None:
    published = tmp_path / "published"
    unet = _published(small, published)
    # As a released folder has them: pickled, without rotary tables, beside a config with entries of its own library.
    state = {name: value for name, value in unet.state_dict().items() if not name.endswith("rotary_emb.freqs")}
    (published / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, published / "unet" / "diffusion_pytorch_model.bin")
    stored = json.loads((published / "unet" / "config.json").read_text())
    stored |= {"_class_name": "UNet3DConditionModel", "mid_block_type": "UNetMidBlock3DCrossAttn", "act_fn": "silu"}
    (published / "unet" / "config.json").write_text(json.dumps(stored))
    storage.write_json(str(published / "scheduler" / "scheduler_config.json"), {"prediction_type": "v_prediction"})

    words = ["--from-cinemo", published, "--output", tmp_path / "bundle", "--set", "data.size=[32,32]"]
    runpy.run_path(str(ROOT / "pipelines/export.py"))["main"]([*map(str, words), "--set", "data.frames=4"])
    bundle = load_bundle(tmp_path / "bundle")
    for name, value in unet.state_dict().items():
        assert torch.equal(bundle.method.unet.state_dict()[name], value)
    assert bundle.recipe.model == small.model
    assert (bundle.recipe.data.size, bundle.recipe.diffusion.prediction) == ((32, 32), "v")
    assert bundle.recipe.encoders.vae_decoder == "vae_temporal_decoder"
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    assert animate(bundle, AnimateRequest(image, "a", steps=2)).frames_FHWC.shape == (4, 32, 32, 3)

    paper = cinemo_320x512()
    (published / "unet" / "config.json").write_text(json.dumps(stored | {"flip_sin_to_cos": False}))
    with pytest.raises(
        InputError, match=r"unet: config.json has flip_sin_to_cos = False, this network supports only True"
    ):
        export.from_published("cinemo", str(published), str(tmp_path / "other"), paper)
    (published / "unet" / "config.json").write_text(json.dumps(stored | {"in_channels": "four"}))
    with pytest.raises(InputError, match=r"unet: model\.in_channels: Input should be a valid integer.*got 'four'"):
        export.from_published("cinemo", str(published), str(tmp_path / "other"), paper)
    (published / "unet" / "config.json").write_text(json.dumps(stored))
    storage.write_json(str(published / "scheduler" / "scheduler_config.json"), {"prediction_type": "epsilon"})
    zero = override(paper, ["data.size=[32,32]", "diffusion.prediction=v", "diffusion.zero_terminal_snr=true"])
    with pytest.raises(InputError, match="zero_terminal_snr is true with prediction epsilon"):
        export.from_published("cinemo", str(published), str(tmp_path / "other"), zero)
    (published / "unet" / "config.json").unlink()
    with pytest.raises(InputError, match=r"do not fit the recipe's model \(\d+ entries\): missing down_blocks"):
        export.from_published("cinemo", str(published), str(tmp_path / "other"), paper)
    shutil.rmtree(published / "tokenizer")
    with pytest.raises(InputError, match=r"published: tokenizer missing; expected a folder with unet"):
        export.from_published("cinemo", str(published), str(tmp_path / "other"), paper)
    assert not (tmp_path / "other").exists()


def test_lavie_weights_become_a_start(small: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = build_method(small).unet.state_dict()
    lavie = {name: value for name, value in state.items() if not name.startswith("add_embedding.")}
    torch.save({"ema": lavie}, tmp_path / "lavie_base.pt")
    line = export.from_published("lavie", str(tmp_path / "lavie_base.pt"), str(tmp_path / "init"), small)
    assert "train.init=" in line
    unet = load_unet(small.model, str(tmp_path / "init"))
    assert torch.equal(unet.conv_in.weight, state["conv_in.weight"])
    assert not unet.add_embedding.linear_2.weight.any()
    first = storage.read_bytes(str(tmp_path / "init" / "diffusion_pytorch_model.safetensors"))
    export.from_published("lavie", str(tmp_path / "lavie_base.pt"), str(tmp_path / "again"), small)
    assert storage.read_bytes(str(tmp_path / "again" / "diffusion_pytorch_model.safetensors")) == first
    with pytest.raises(InputError, match="is not empty"):
        export.from_published("lavie", str(tmp_path / "lavie_base.pt"), str(tmp_path / "init"), small)
    torch.save({**lavie, "more.weight": torch.zeros(1)}, tmp_path / "strange.pt")
    with pytest.raises(InputError, match=r"\(1 entries\): extra more.weight"):
        export.from_published("lavie", str(tmp_path / "strange.pt"), str(tmp_path / "other"), small)
