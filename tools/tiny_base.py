"""Trains a tiny recipe's networks, and with them the text model, on rendered frames: what tiny recipes start from.

Frames are rendered and encoded right here, no video files between, and everything is kept on one device: the script
needs torch, numpy and this package, and goes on where it was stopped. What makes motion learnable in so little time:

- Timesteps near pure noise (`train.timestep_shift`): there motion is decided, while residuals are cleaned elsewhere.
- First pans alone, where direction is the whole of what there is to know; then everything; at first half the frames.
- The text model may learn along, so that its states say what decides motion. It starts from the contrastive one.
- A clip backwards is a clip of the opposite direction: every other sample.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from cinemo import storage
from cinemo.config import Recipe
from cinemo.media.flow import METHOD as FLOW
from cinemo.media.flow import dense_flow
from cinemo.media.motion import mean_adjacent_ssim
from cinemo.media.synthetic import CLIP_FRAMES, PAINTERS, SPEEDS, render_scene, turned
from cinemo.methods import build_method, image_encoder_place, method_class
from cinemo.networks.frozen import ImageEncoder, Text, Vae, network_digest
from cinemo.networks.memory import keep_freed_memory
from cinemo.networks.weights import save_network
from cinemo.training.run.batch import FrozenStates, HostBatch, host_batch, on_device
from cinemo.types import InputError, LatentSample, keyed_generator

CHUNK = 200  # clips of one file
REVERSED = 0.5
_MIDDLE = list(SPEEDS)[1]
STATE = "state.pt"

Log = Callable[[str], None]


@dataclass(frozen=True)
class Phase:
    """``samples`` seen at learning rate ``lr``, of the first ``frames`` frames; ``shares``: how often each kind is."""

    name: str
    samples: int
    frames: int
    lr: float
    shift: float
    shares: Mapping[str, float]


# A shape changes a fifth of the picture, a pan all of it: its direction is learnt last unless it is seen most.
SHARES = {"object": 5, "pan": 3, "flow": 3, "zoom": 1.5, "still": 0.5}
PHASES = (
    Phase("pans, half the frames", 1_600, 8, 1.5e-3, 4.0, {"pan": 1}),
    Phase("all kinds, half the frames", 8_000, 8, 1.2e-3, 4.0, SHARES),
    Phase("all kinds, all frames", 20_400, 16, 1.0e-3, 4.0, SHARES),
    Phase("every noise level", 6_000, 16, 7e-4, 2.5, SHARES),
)


def planned(share: float, frames: int | None = None) -> tuple[Phase, ...]:
    """`PHASES` with a share of their samples; ``frames``: of every phase, for networks made for one number of them."""
    return tuple(
        replace(phase, samples=max(64, round(phase.samples * share)), frames=frames or phase.frames) for phase in PHASES
    )


@dataclass(frozen=True)
class Clips:
    """``latents_NFCHW``: float16, normalised as the autoencoder says. ``facts``: kind, caption, direction, SSIM and
    interval. ``tokens_NFLD``: float16, of every frame, where the recipe's method needs an image encoder.
    ``flow_NF2HW``: float16, where its method asks for flow, as precompute stores it."""

    latents_NFCHW: np.ndarray
    facts: Sequence[dict[str, Any]]
    tokens_NFLD: np.ndarray | None = None
    flow_NF2HW: np.ndarray | None = None


def make_clips(
    output: Path, recipe: Recipe, count: int, seed: int, processes: int, log: Log, chunk: int = CHUNK
) -> Clips:
    """Render and encode ``count`` clips in files of ``chunk``, those that are there as they are."""
    output.mkdir(parents=True, exist_ok=True)
    numbers = range(-(-count // chunk))
    missing = [number for number in numbers if not _facts_file(output, number).exists()]
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(min(processes, max(1, len(missing)))) as pool:
        work = [(output, recipe, seed, number, chunk) for number in missing]
        for done, _ in enumerate(pool.imap_unordered(_make_chunk, work), 1):
            rate = done * chunk / (time.monotonic() - began)
            log(f"clips: {done * chunk} of {len(missing) * chunk}, {rate:.1f}/s")
    chunks = [_read_chunk(output, recipe, seed, number, chunk) for number in numbers]

    def whole(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
        there = [array for array in arrays if array is not None]
        return np.concatenate(there)[:count] if there else None

    latents, rows, tokens, flows = zip(*chunks, strict=True)
    facts = list(itertools.chain.from_iterable(rows))
    return Clips(np.concatenate(latents)[:count], facts[:count], whole(tokens), whole(flows))


def steady(clips: Clips) -> Clips:
    """Without the clips whose captions leave their speed open, and with no word where it is the middle one.

    For methods that are told the frame interval and no motion score: the interval then decides how far things move from
    one frame to the next.
    """
    kept = [number for number, row in enumerate(clips.facts) if row["speed"] or not row["direction"]]
    facts = [clips.facts[number] for number in kept]
    facts = [row | {"caption": row["caption"].replace(f" {_MIDDLE} ", " ")} for row in facts]
    tokens, flow = (None if array is None else array[kept] for array in (clips.tokens_NFLD, clips.flow_NF2HW))
    return Clips(clips.latents_NFCHW[kept], facts, tokens, flow)


def train_base(
    output: Path, recipe: Recipe, clips: Clips, phases: Sequence[Phase], settings: TrainSettings, log: Log
) -> dict[str, Any]:
    """Train through ``phases``; writes the networks and ``text_encoder/`` (averaged weights, float16) under ``output``.

    Returns:
        What was done: samples seen, minutes, the mean of the last losses.
    """
    if settings.processes > 1:
        rendezvous = output / ".rendezvous"
        rendezvous.unlink(missing_ok=True)
        work = (output, recipe, clips, phases, settings, f"file://{rendezvous}")
        spawn(_one_of, work, settings.processes)  # type: ignore[no-untyped-call]
    else:
        _train(output, recipe, clips, phases, settings, log)
    export(output, recipe, settings)
    state = _read_state(output / STATE, "cpu")
    return {"samples": state["samples"], "minutes": round(state["seconds"] / 60, 1), "loss": round(state["loss"], 4)}


def _one_of(
    rank: int, output: Path, recipe: Recipe, clips: Clips, phases: Sequence[Phase], settings: TrainSettings, place: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=settings.processes)
    _train(output, recipe, clips, phases, settings, lambda line: print(line, flush=True) if rank == 0 else None)
    dist.destroy_process_group()


def _train(
    output: Path, recipe: Recipe, clips: Clips, phases: Sequence[Phase], settings: TrainSettings, log: Log
) -> None:
    """In each of ``settings.processes``: all hold the same weights and take their share of every batch."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    device = torch.device(settings.device)
    keep_freed_memory()
    torch.manual_seed(settings.seed)
    begun = None
    if settings.init:
        kind, init = method_class(recipe), settings.init
        begun = {part: kind.load_network(recipe, part, init, torch.float32, base=True) for part in kind.parts}
    method = build_method(recipe, begun).to(device).train()
    frozen = _States.of(recipe, device)
    networks = method.networks
    if settings.learn_text:
        networks |= {"text_encoder": frozen.learning()}
    parameters = [parameter for network in networks.values() for parameter in network.parameters()]
    matrices = [p for name, p in method.named_parameters() if is_matrix(name, p)]
    others = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    adam = torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.99), weight_decay=0.01)
    optimizers: dict[str, torch.optim.Optimizer] = {"muon": Muon(matrices), "adam": adam}
    averages = [parameter.detach().clone() for parameter in parameters]
    step, seconds = 0, 0.0
    state_file = output / STATE
    if state_file.exists():
        state = _read_state(state_file, device)
        for name, network in networks.items():
            network.load_state_dict(state[name])
        for name, optimizer in optimizers.items():
            if name in state:
                optimizer.load_state_dict(state[name])
        averages = list(state["averages"])
        step, seconds = state["step"], state["seconds"]
        log(f"continuing at step {step}")

    def store() -> None:
        if rank:
            return
        state = {name: network.state_dict() for name, network in networks.items()}
        state |= {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        loss = float(torch.stack(losses[-200:]).mean()) if losses else float("nan")
        rest = {"averages": averages, "step": step, "seconds": seconds, "samples": step * batch, "loss": loss}
        torch.save(state | rest, state_file.with_suffix(".part"))
        os.replace(state_file.with_suffix(".part"), state_file)

    batch = settings.batch
    ends = list(itertools.accumulate(phase.samples // batch for phase in phases))
    began, losses = time.monotonic(), []
    before, first = seconds, step
    if step >= ends[-1]:
        return  # what is stored is the end of it
    while step < ends[-1]:
        number = bisect.bisect_right(ends, step)
        phase = phases[number]
        length = phase.samples // batch
        within = step - (ends[number] - length)
        warm = min(1.0, (within + 1) / 50)
        fall = 0.5 * (1 + math.cos(math.pi * within / length)) if phase is phases[-1] else 1
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = phase.lr * warm * max(0.02, fall)
        inputs = on_device(_batch(clips, phase, settings, step, rank, recipe), frozen, device, torch.float32)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            loss: Tensor = method(*inputs)
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(loss)
        if dist.is_initialized():
            _average([parameter.grad for parameter in parameters if parameter.grad is not None])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        step += 1
        decay = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - decay)
        losses.append(loss.detach())
        if step % 50 == 0:
            seconds = before + time.monotonic() - began
            rate = (step - first) * batch / (time.monotonic() - began)
            left = (ends[-1] - step) * batch / rate / 60
            mean = float(torch.stack(losses[-100:]).mean())
            log(f"{phase.name}: step {step} of {ends[-1]}, loss {mean:.4f}, {rate:.1f} samples/s, {left:.0f} min left")
        if step % settings.checkpoint_every == 0:
            store()
    seconds = before + time.monotonic() - began
    store()


def _average(gradients: Sequence[Tensor]) -> None:
    """Over all processes, in one exchange."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


@dataclass(frozen=True)
class TrainSettings:
    """``init``: as ``train.init`` (None: from nothing). ``batch``: samples of a step, of all ``processes``. On CPUs two
    processes with a thread each are half as fast again as one with two."""

    init: str | None = None
    learn_text: bool = True
    batch: int = 8
    seed: int = 101
    device: str = "cpu"
    bf16: bool = False
    checkpoint_every: int = 100
    processes: int = 1


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before each step (K. Jordan 2024), by Newton and Schulz's iteration.

    It took two thirds of AdamW's samples here. PyTorch's own takes matrices alone; a convolution's kernel is one of its
    outputs by everything else. Steps have AdamW's usual size (arXiv 2502.16982), so that both share a learning rate.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], momentum: float = 0.95, iterations: int = 4) -> None:
        super().__init__(matrices, {"lr": 1.0, "momentum": momentum, "iterations": iterations, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                update = orthogonal(update, group["iterations"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(update.shape) ** 0.5
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor, iterations: int) -> Tensor:
    """Nearly the orthogonal matrix next to ``matrix``: its singular values are brought to about 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-12)
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether `Muon` learns a parameter: what maps features to features, neither ends nor biases."""
    return parameter.ndim >= 2 and not any(end in name for end in _ENDS)


_ENDS = (
    *("conv_in", "conv_out", "linear_1", "relative_attention_bias"),
    *("input_blocks.0.0", "unet.out.", "time_embed.0", "fps_embedding.0", "latents", "alpha", "motion_encoder.entry.0"),
)


def _read_state(path: Path, device: torch.device | str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        missing = {"averages", "step", "seconds"} - state.keys()
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: is not a training state ({reason}); remove it to start again") from None
    if missing:
        raise InputError(
            f"{path}: is not a training state ({', '.join(sorted(missing))} missing); remove it to start again"
        )
    return state


def export(output: Path, recipe: Recipe, settings: TrainSettings) -> None:
    """Every network, and ``text_encoder/`` where it has learnt, in half precision: the averages of ``state.pt``."""
    if not (output / STATE).exists():
        raise InputError(f"{output}: no {STATE} there; train first")
    state = _read_state(output / STATE, "cpu")
    networks = dict(build_method(recipe).networks)
    text = _States.of(recipe).learning() if settings.learn_text else None
    parameters = [p for network in networks.values() for p in network.parameters()]
    parameters += [] if text is None else list(text.parameters())
    with torch.no_grad():
        for parameter, average in zip(parameters, state["averages"], strict=True):
            parameter.copy_(average)
    for part, network in networks.items():
        save_network(network.half(), output / part)
    if text is not None:
        learnt: Any = text.half()
        learnt.save_pretrained(output / "text_encoder")


def _make_chunk(work: tuple[Path, Recipe, int, int, int]) -> None:
    output, recipe, seed, number, size = work
    torch.set_num_threads(1)
    keep_freed_memory()
    vae, data = Vae(recipe.encoders.vae), recipe.data
    image = ImageEncoder(image_encoder_place(recipe)) if _shows_pictures(recipe) else None
    latents, facts, tokens, flows = [], [], [], []
    for index in range(number * size, (number + 1) * size):
        scene = render_scene(seed, index, data.size)
        generator = keyed_generator(seed, "view", index)
        low, high = data.frame_interval
        interval = int(torch.randint(low, high + 1, (), generator=generator))
        start = int(torch.randint(CLIP_FRAMES - interval * (data.frames - 1), (), generator=generator))
        frames_FHWC = scene.frames(start + interval * k for k in range(data.frames))
        pixels = torch.from_numpy(frames_FHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents.append(vae.encode(pixels).half().numpy())
        words = {name: scene.motion.get(name) for name in ("direction", "speed")}
        row = {"kind": scene.motion["kind"], "caption": scene.caption, **words}
        facts.append(row | {"ssim": mean_adjacent_ssim(frames_FHWC, data.ssim), "interval": interval})
        if image is not None:
            tokens.append(image.encode(list(frames_FHWC)).half().numpy())
        if _shows_flow(recipe):
            flows.append(dense_flow(frames_FHWC, latents[-1].shape[2:]))
    np.save(_latents_file(output, number), np.stack(latents))
    if tokens:
        np.save(_tokens_file(output, number), np.stack(tokens))
    if flows:
        np.save(_flow_file(output, number), np.stack(flows))
    # Last, and at once: a chunk that has it is whole.
    storage.write_json(str(_facts_file(output, number)), {"made_of": _made_of(recipe, seed, size), "clips": facts})


def _made_of(recipe: Recipe, seed: int, size: int) -> str:
    """What decides the clips of a chunk; another seed or recipe must not go on with them."""
    data = recipe.data
    scenes = [render_scene(seed, 0, data.size, kind=kind) for kind in PAINTERS]
    world = [[scene.caption, scene.motion, hashlib.sha256(scene.draw(0).tobytes()).hexdigest()] for scene in scenes]
    view = [seed, size, data.size, data.frames, data.frame_interval, data.ssim]
    covers = [view, world, network_digest(recipe.encoders.vae), "interval", "speed"]
    covers += [network_digest(image_encoder_place(recipe))] if _shows_pictures(recipe) else []
    covers += [FLOW] if _shows_flow(recipe) else []
    return hashlib.sha256(json.dumps(covers).encode()).hexdigest()


def _read_chunk(
    output: Path, recipe: Recipe, seed: int, number: int, size: int
) -> tuple[np.ndarray, list[Any], np.ndarray | None, np.ndarray | None]:
    """Latents, facts, image tokens and flow of a chunk.

    Raises:
        InputError: it was made of something else, or is damaged.
    """
    path = _facts_file(output, number)
    try:
        facts = json.loads(path.read_text())
        latents = np.load(_latents_file(output, number))
        tokens = np.load(_tokens_file(output, number)) if _shows_pictures(recipe) else None
        flow = np.load(_flow_file(output, number)) if _shows_flow(recipe) else None
        known = facts["made_of"], len(facts["clips"]) == len(latents)
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove the chunk, it is then rendered again") from None
    if known != (_made_of(recipe, seed, size), True):
        raise InputError(f"{path}: holds clips of another seed, recipe or autoencoder; choose another --output")
    return latents, facts["clips"], tokens, flow


def _shows_flow(recipe: Recipe) -> bool:
    return "flow" in method_class(recipe).stored_fields(recipe)


def _shows_pictures(recipe: Recipe) -> bool:
    return "image_encoder" in method_class(recipe).needs


def _latents_file(output: Path, number: int) -> Path:
    return output / f"chunk-{number:04d}.npy"


def _tokens_file(output: Path, number: int) -> Path:
    return output / f"chunk-{number:04d}.tokens.npy"


def _flow_file(output: Path, number: int) -> Path:
    return output / f"chunk-{number:04d}.flow.npy"


def _facts_file(output: Path, number: int) -> Path:
    return output / f"chunk-{number:04d}.json"


class _States(FrozenStates):
    """Encoders of which the text model may learn along."""

    def learning(self) -> nn.Module:
        """The text model, from now on with gradients."""
        self._learns = True
        encoder: Any = self._encoder
        network: nn.Module = encoder.network
        network.requires_grad_(True).train()
        return network

    def texts(self, captions: Sequence[Text]) -> Tensor:
        if not getattr(self, "_learns", False):
            return super().texts(captions)
        encoder: Any = self._encoder
        tokens = encoder.tokenizer.ids(captions)
        states: Tensor = encoder.network(tokens.to(encoder.network.device)).last_hidden_state
        return states


def _batch(clips: Clips, phase: Phase, settings: TrainSettings, step: int, rank: int, recipe: Recipe) -> HostBatch:
    """A process's share of a batch and its draws, all keyed by the step: they do not depend on how many share it."""
    generator = keyed_generator(settings.seed, "base", step)
    number = Counter(row["kind"] for row in clips.facts)
    shares = torch.tensor([phase.shares.get(row["kind"], 0.0) / number[row["kind"]] for row in clips.facts])
    picked = torch.multinomial(shares, settings.batch, replacement=True, generator=generator).tolist()
    backwards = (torch.rand(settings.batch, generator=generator) < REVERSED).tolist()
    first, size = rank * settings.batch // settings.processes, settings.batch // settings.processes
    samples = [_sample(clips, phase, picked[place], backwards[place], place) for place in range(first, first + size)]
    changed = {
        "data": recipe.data.model_copy(update={"frames": phase.frames}),
        "train": recipe.train.model_copy(
            update={"seed": settings.seed, "timestep_shift": phase.shift, "timestep_shift_steps": None}
        ),
    }
    return host_batch(samples, step, recipe.model_copy(update=changed))


def _sample(clips: Clips, phase: Phase, index: int, back: bool, place: int) -> LatentSample:
    """A clip as it is or backwards; ``place``: in the batch, where a clip may be more than once."""
    row, caption, fields = clips.facts[index], clips.facts[index]["caption"], {}
    latents_FCHW = clips.latents_NFCHW[index][: phase.frames]
    if clips.tokens_NFLD is not None:
        fields["frame_tokens"] = clips.tokens_NFLD[index][: phase.frames]
    if clips.flow_NF2HW is not None:
        fields["flow"] = clips.flow_NF2HW[index][: phase.frames - 1]
    if back:
        latents_FCHW = latents_FCHW[::-1].copy()
        fields = {name: array[::-1].copy() for name, array in fields.items()}
        if "flow" in fields:  # of what has not yet moved: the same where flow changes slowly
            fields["flow"] = -fields["flow"]
        caption = turned(caption, row["direction"]) if row["direction"] else caption
    return LatentSample(
        key=f"{place}", clip_id=f"{index}", uri="", caption=caption, latents_FCHW=latents_FCHW, ssim=row["ssim"],
        fps=24.0, frame_interval=row["interval"], start_frame=0, fields=fields,
    )  # fmt: skip
