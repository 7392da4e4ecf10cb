"""Several ranks in processes of their own, as Ray Train would start them, and the short training they run in tests."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cinemo.config import Recipe
from cinemo.methods import build_method
from cinemo.methods.cinemo import CinemoTrain
from cinemo.training.run.batch import host_batch
from cinemo.training.run.engine import Engine
from cinemo.types import Condition, LatentBatch, keyed_generator
from tests.training.conftest import moving_samples


def on_ranks(world: int, directory: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns on each rank of a new process group."""
    torch.multiprocessing.spawn(_rank, (world, directory, function, arguments), nprocs=world)
    return [pickle.loads((directory / f"result-{rank}").read_bytes()) for rank in range(world)]


def _rank(rank: int, world: int, directory: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=(directory / "rendezvous").as_uri(), rank=rank, world_size=world
    )
    (directory / f"result-{rank}").write_bytes(pickle.dumps(function(*arguments)))
    torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Case:
    """What a curve must not depend on, apart from the rounding of its precision."""

    stage: int
    offload: str = "none"
    precision: str = "fp32"


def made_engine(recipe: Recipe, freeze: str | None = None, **train: Any) -> Engine:
    """An engine on this process group: one rank accumulates two micro batches, two hold their whole share.

    Args:
        freeze: parameters whose name holds this are frozen.
    """
    world = torch.distributed.get_world_size()
    changed = {"workers": world, "micro_batch": 2} | train
    settings = CinemoTrain(**(recipe.train.model_dump() | changed))
    torch.manual_seed(0)
    method = build_method(recipe)
    method.checkpoint_activations(settings.setting.gradient_checkpointing)
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(freeze is None or freeze not in name)
    return Engine(method, settings, torch.device("cpu"))


def train_steps(engine: Engine, recipe: Recipe, steps: range) -> list[float]:
    """The mean loss over ranks and micro batches of each step, on four samples."""
    curve, mine, size = [], moving_samples(4)[engine.rank :: engine.world], engine.train.micro_batch
    for step in steps:
        losses = []
        for start in range(0, len(mine), size):
            host = host_batch(mine[start : start + size], step, recipe)
            shape = (3, recipe.model.cross_attention_dim)
            text = torch.stack([torch.randn(shape, generator=keyed_generator(0, "text", key)) for key in host.keys])
            condition = Condition(
                image=host.video_BCFHW[:, :, 0], text=text.to(engine.dtype), motion_bucket=host.bucket_B
            )
            loss = engine.loss(LatentBatch(host.video_BCFHW, condition), host.t_B, host.noise_BCFHW).mean()
            engine.step(loss)
            losses.append(loss.detach().float())
        curve.append(float(engine.mean(torch.stack(losses).mean())))
    return curve
