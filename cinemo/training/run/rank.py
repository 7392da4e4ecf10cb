"""One rank of a training under Ray Train: network, engine, data, and what happens with reports and checkpoints."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import ray
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from ray.train.torch import get_device

from cinemo import cache, storage
from cinemo.accelerators import peak_flops
from cinemo.config import Recipe
from cinemo.data.loading.loader import HeldOut, StepBatch
from cinemo.methods import build_method, mark_trainable
from cinemo.networks.frozen import Vae
from cinemo.networks.memory import keep_freed_memory
from cinemo.recipes import parse_recipe
from cinemo.training.checkpoint import checkpoints, snapshots
from cinemo.training.report import sample_log
from cinemo.training.report.metrics import Report
from cinemo.training.report.progress import Event, Notice, Resumed, Saved, Sheet
from cinemo.training.report.prompt_sheets import animated as animated_prompts
from cinemo.training.report.prompt_sheets import write_prompts
from cinemo.training.report.prompts import kept
from cinemo.training.report.sheets import first_samples, sheet_latents, write_samples
from cinemo.training.report.validation import Validation
from cinemo.training.run.base_weights import base_networks
from cinemo.training.run.batch import FrozenStates, recipe_of, stored_fields
from cinemo.training.run.engine import Engine
from cinemo.training.run.growth import Batches, Generations, TrainingData, batches_of, generations_of, opened
from cinemo.training.run.left_out import LeftOut
from cinemo.training.run.loop import AHEAD, train
from cinemo.training.run.notice import Agreement, Terminated, Wish, Wishes
from cinemo.training.run.profiler import Profiler
from cinemo.types import InputError, RunError, keyed_seed

WITHOUT_DEADLINE_SECONDS = 100.0  # left to a node that is taken away nobody knows when: Ray Train waits for 120


def work(config: dict[str, Any]) -> None:
    """One rank."""
    mailbox = config["mailbox"]
    if ray.get(mailbox.fault.remote()) or ray.get(mailbox.stopping.remote()):
        return  # the attempt before this one met what no restart can mend, or there shall be none
    # Signals are for the actor's main thread; this function has one of its own.
    ray.get(ray.get_runtime_context().current_actor.execute.remote(Terminated.listen))
    with _posting_faults(mailbox):
        recipe = parse_recipe(config["recipe"], "recipe")
        _train(recipe, config, mailbox)


@contextmanager
def _posting_faults(mailbox: Any) -> Iterator[None]:
    """What no restart can mend is told to the job's own process."""
    try:
        yield
    except (InputError, RunError) as error:
        ray.get(mailbox.post_fault.remote(type(error).__name__, str(error)))
        raise


def _train(recipe: Recipe, config: Mapping[str, Any], mailbox: Any) -> None:
    sources, output = config["sources"], config["output"]
    torch.set_num_threads(max(1, int(recipe.train.cpus_per_worker)))
    context = ray.train.get_context()
    place = context.get_storage()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    assert isinstance(device, torch.device)
    # Every rank must begin with the same weights: ZeRO-3 keeps of each rank only its share.
    torch.manual_seed(keyed_seed(recipe.train.seed, "weights"))
    method = build_method(recipe, base_networks(recipe))
    mark_trainable(method, recipe.train)
    method.checkpoint_activations(recipe.train.setting.gradient_checkpointing)
    if recipe.compile:
        method.compile_networks(recipe.compile == "regional")
    if device.type == "cpu":
        keep_freed_memory()
    engine = Engine(method, recipe.train, device, across_nodes=context.get_local_world_size() < world)
    frozen = FrozenStates.of(recipe, device, engine.dtype, config["known"])

    step, history = 0, []
    indexes = opened(sources)
    generations: list[Generations] = [[(0, shards)] for shards in config["shards"]]
    batches: list[Batches] | None = None
    committed = ray.train.get_checkpoint()  # of this job; else what it starts from
    start = config["start"]
    if committed is not None:
        start = f"s3://{committed.path}" if storage.is_remote(output) else committed.path
    if start is not None:
        with cache.borrowed(start) as directory:
            state = engine.load(directory)
            made_with = json.loads((directory / "recipe.json").read_text())["train"]
            engine.gather(None)  # all ranks of a node read one copy, so none gives it up before all have it
        step, history = state["step"], [Report.of_kept(row) for row in state["history"]]
        if config["other_data"] and committed is None:
            batches = [(step, recipe.train.global_batch, recipe.train.reading_lanes)]
        else:
            generations = generations_of(indexes, sources, state)
            batches = batches_of(state, made_with, recipe.train)
    begun = [index.first(one[0][1]) for index, one in zip(indexes, generations, strict=True)]

    def post(event: Event) -> None:
        if rank == 0:
            mailbox.post.remote(pickle.dumps(event))

    stored = stored_fields(recipe)

    def once(call: Callable[[], Any]) -> Any:
        return engine.gather(call() if rank == 0 else None)[0]

    data = TrainingData(sources, indexes, generations, recipe.train, rank, world, stored, once, batches)
    loader, left_out = data.loader, LeftOut.of(recipe.train)

    def follow(done: int, ahead: int) -> None:
        for news in data.follow(done, ahead) if recipe.train.grow else ():
            post(news)

    def on_report(report: Report) -> None:
        if recipe.train.on_damaged == "skip":
            report = replace(report, skipped=sum(engine.gather(loader.skipped.samples)))
        history.append(report)
        post(report)

    seen: dict[int, tuple[str, ...]] = {}  # ids of this rank's samples, by step; made ahead of the training
    if rank == 0:
        sample_log.cut(output, step)

    def noted(batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
        for batch in batches:
            seen[batch.step] = batch.keys
            yield batch

    under_way = checkpoints.UnderWay(pinned=device.type == "cuda")
    wishes = Wishes(recipe.train, rank == 0, lambda: ray.get(mailbox.stopping.remote()), config["watched"])
    taken: dict[str, None] = {}  # nodes that are about to be, in the order of their notices
    reasons: list[str] = []

    def look() -> Wish:
        info = ray.train.get_preemption_info()
        news = [node for node in info.preempted_node_ids if node not in taken] if info else []
        if not news:
            return Wish.NOTHING
        taken.update(dict.fromkeys(news))
        left = info.deadline_ms / 1000 - time.time() if info.deadline_ms else WITHOUT_DEADLINE_SECONDS
        wishes.until(left, under_way.seconds)
        reasons.append(f"node {', '.join(news)} will be taken away in {left:.0f} s: saved, training goes on until then")
        return Wish.SAVE

    def on_checkpoint(done: int) -> None:
        wishes.saved()
        if snapshots.is_due(recipe.train, done):
            snapshots.write(output, done, engine)
        follow(done, AHEAD)
        identity = data.identity
        state = {"step": done, "epoch": loader.epoch(done), **identity, "history": [row.kept() for row in history]}
        memory = under_way.begin()
        snapshot = engine.snapshot(state, memory)
        own = {step: seen.pop(step) for step in sorted(seen) if step < done}
        ranks = engine.gather((own, snapshot.sizes))
        keys = {step: [key for parts, _ in ranks for key in parts[step]] for step in own}
        files = {name: size for _, sizes in ranks for name, size in sizes.items()}

        def write(_: Checkpoint, name: str) -> Checkpoint:
            uri = storage.join(output, checkpoints.RUN, name)
            saving = checkpoints.saving(done, sum(files.values()), output)
            with _posting_faults(mailbox), under_way.writing(memory), saving:
                if rank == 0:
                    sample_log.write(output, keys)
                snapshot.write(uri)
                if rank == 0:
                    checkpoints.describe(uri, recipe, done, world, identity["dataset"], files, identity["sources"])
            post(Saved(done))
            return Checkpoint(place.build_checkpoint_path_from_name(name), place.storage_filesystem)

        ray.train.report(
            {"step": done, "loss": history[-1].loss},
            checkpoint=Checkpoint(place.experiment_fs_path, place.storage_filesystem),  # `write` takes the snapshot
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=write,
            delete_local_checkpoint_after_upload=False,
        )
        if reasons:
            post(Notice(done, reasons.pop()))

    samples = first_samples(begun[0], recipe.train.sample_count, recipe.train.held_out_shards, stored)

    prompts = kept(output, recipe)

    def on_sheet(done: int) -> None:
        if not samples and not prompts:
            return
        shown = recipe_of(samples[0], recipe) if samples else recipe
        with engine.averaged():
            if rank == 0 or engine.sharded:
                animated = sheet_latents(shown, method, frozen, samples, device)
                videos = animated_prompts(recipe, method, frozen, prompts, device, engine.dtype)
        if rank == 0:
            encoders = recipe.encoders
            vae = Vae(encoders.vae_decoder or encoders.vae, device, engine.dtype, encoders.statistics)
            sheets = [write_samples(output, shown, done, vae, samples, animated)] if samples else []
            sheets += [write_prompts(output, recipe, done, vae, videos)] if videos else []
            post(Sheet.of(sheets))

    post(Resumed(step, tuple(history)))
    if step:
        follow(step, 0)
    if not step and recipe.train.init is not None and recipe.train.sample_every:
        engine.method.eval()
        on_sheet(0)  # what fine-tuning begins with, and how much it moves
    held_out = HeldOut.of(begun[0], recipe.train, stored)
    validate = Validation(recipe, engine, frozen, held_out) if recipe.train.held_out_shards else None
    sample_seconds = config["flops"] / peak_flops(device, engine.dtype)
    profiled = range(0) if rank and not config["profile_all_ranks"] else config["profile"]
    profiler = Profiler(profiled, step, output, rank, device, lambda event: mailbox.post.remote(pickle.dumps(event)))
    try:
        ended = train(
            recipe,
            engine,
            noted(left_out.batch(loader, number) for number in count(step)),
            frozen,
            step,
            on_report,
            on_checkpoint,
            on_sheet,
            validate,
            sample_seconds,
            profiler.after,
            Agreement(wishes.own, look),
        )
        if ended is Wish.STOP:
            post(Notice(history[-1].step, "the last one, as told; its checkpoint is being written", ends=True))
        elif ended is Wish.LEAVE:
            post(Notice(history[-1].step, "a worker was told to end (SIGTERM), so all of them begin anew from here"))
    finally:
        under_way.finish()
    if ended is Wish.LEAVE:
        ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
        raise RuntimeError("a worker was told to end (SIGTERM)")
    ray.get(mailbox.fault.remote())  # an actor answers in order: what was posted before has arrived
