"""The Ray Train entry: a group of workers around `cinemo.training.run.loop`, resume, and what the job's process shows.

A restart inside a job (a worker died) takes up the checkpoint that Ray Train has committed. A new job (``--resume
auto`` after the whole job was killed, or with another number of workers or ZeRO stage) takes up the newest complete one
on storage. In both the data position comes from the loaded checkpoint itself.
"""

from __future__ import annotations

import importlib.util
import math
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cinemo import storage
from cinemo.accelerators import Accelerator, this_accelerator
from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.dataset.statistics import with_statistics
from cinemo.data.loading.source import Source
from cinemo.data.precompute.cluster import connect
from cinemo.data.precompute.pools import ask_for_nodes, joined
from cinemo.lock import Lock, hold
from cinemo.methods import check_trainable, image_encoder_place, method_class
from cinemo.networks.frozen import check_image_encoder
from cinemo.progress import Work, doing, say
from cinemo.tracking import preload
from cinemo.training.checkpoint import checkpoints
from cinemo.training.plan.cost import training_flops
from cinemo.training.plan.search import settled
from cinemo.training.report import prompts
from cinemo.training.report.mailbox import Mailbox
from cinemo.training.report.profiled import ProfileRequest
from cinemo.training.report.progress import (
    Notice,
    Progress,
    Resumed,
    TrainSummary,
    dataset_profile,
    read_summary,
)
from cinemo.training.report.prompts import Prompt
from cinemo.training.run import rank
from cinemo.training.run.base_weights import check_base
from cinemo.training.run.batch import IMAGE_TOKENS, TEXT_STATES, KnownStates, stored_fields
from cinemo.training.run.dataset_check import check_canary, check_dataset
from cinemo.training.run.ending import Ending
from cinemo.training.run.growth import TrainingData, digest_of, opened
from cinemo.training.run.starting import name_of, starting_point
from cinemo.training.run.stored_states import with_stored_states
from cinemo.types import InputError, RunError, refuse

_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"  # Ray Train's: an actor that tells workers of nodes that will be taken
_CHDIR = "RAY_CHDIR_TO_TRIAL_DIR"  # Ray Train's: whether workers leave the directory that relative places begin at


def run(
    recipe: Recipe,
    data: str | Sequence[Source],
    output: str,
    resume: str = "auto",
    break_lock: bool = False,
    change_batch: bool = False,
    profile: ProfileRequest | None = None,
    validation: str | None = None,
) -> TrainSummary:
    """Train ``recipe`` on datasets of latents and return how it ended.

    Args:
        data: dataset directory written by precompute (local or s3://), or several with their shares. Sample sheets,
            validation and statistics (``encoders.normalize``) are those of the first.
        output: run directory (local or s3://): ``train.json``, ``loss.csv``, ``samples/``, ``train/checkpoint_*``.
        resume: ``auto`` continues what ``output`` holds, or starts; ``never`` insists on an empty output; a URI (a
            checkpoint or another run's output) starts from that checkpoint, its step included; ``data`` may then be
            other datasets, which begin with their first epoch.
        break_lock: see `cinemo.lock.hold`.
        change_batch: a checkpoint may have been made with another ``train.global_batch`` or ``train.lanes``.
        profile: steps to profile, see `cinemo.training.run.profiler`.
        validation: pictures and prompts that sheets animate (`cinemo.training.report.prompts`); None: those that the
            run has; "none": none.

    Raises:
        InputError: dataset, checkpoint, recipe and machine do not fit together, or another training holds ``output``.
        RunError: training failed for good.
    """
    _check_packages(recipe)
    sources = [Source(data)] if isinstance(data, str) else list(data)
    sources = [replace(source, uri=storage.absolute(source.uri)) for source in sources]
    output = storage.absolute(output)
    with doing("checking the dataset and the weights to start from"):
        indexes = opened(sources)
        for index in indexes:
            check_dataset(index, recipe)
        recipe, lines = with_stored_states(with_statistics(recipe, indexes[0]), indexes)
        recipe = recipe.with_lanes()
        check_trainable(recipe, method_class(recipe))
        if "image_encoder" in method_class(recipe).needs:
            check_image_encoder(image_encoder_place(recipe))
        base_note = check_base(recipe)
        start = starting_point(recipe, sources, indexes, output, resume, change_batch)
        validated = _validation(validation, recipe)
    summary, card = read_summary(output), start.card if start else None
    if card and card.step >= recipe.train.max_steps:
        if resume == "auto" and summary:
            say(f"{output}: already finished at step {summary.steps}; raise --max-steps to continue")
            return summary
        if resume != "auto":  # it is another run's
            raise InputError(
                f"checkpoint {card.uri}: has done {card.step} steps, and train.max_steps is {recipe.train.max_steps}; "
                "raise --max-steps, which counts them too"
            )
    shards = [[(0, len(index.shards))] for index in indexes]
    data_of_all = TrainingData(sources, indexes, shards, recipe.train, fields=stored_fields(recipe))
    for line in (*data_of_all.lines(), *lines):
        say(line)
    steps = profile.steps(card.step if card else 0, recipe.train.max_steps) if profile else range(0)
    with hold(output, break_lock) as lock:
        if validation is None:
            validated = _kept_prompts(recipe, output, card)
        elif not validated:
            prompts.drop(output)
        if validated:
            prompts.keep(validated, output)
        profiled = {"profile": steps, "profile_all_ranks": bool(profile and profile.all_ranks)}
        return _train(recipe, sources, indexes, output, resume, change_batch, base_note, lock, profiled)


def _validation(place: str | None, recipe: Recipe) -> list[Prompt]:
    """What sheets are to animate, each row tried.

    Raises:
        InputError: some of it cannot be; what is wrong was said, a line for each row.
    """
    if place is None or place == "none":
        return []
    found = prompts.read(place, recipe)
    faults = prompts.faults(found, recipe)
    refuse(faults, f"validation {place}: {len(faults)} of {len(found)} rows cannot be animated, as said above", say)
    return found


def _kept_prompts(recipe: Recipe, output: str, start: checkpoints.CheckpointCard | None) -> list[Prompt]:
    """What a new run takes over from the one whose checkpoint it starts from; says what sheets go on with."""
    for place in (output, start.uri.rsplit("/", 2)[0] if start else output):
        if found := prompts.kept(place, recipe):
            say(f"sheets go on with the {len(found)} prompts of {storage.join(place, 'validation')}")
            return [] if place == output else found
    return []


def _train(
    recipe: Recipe,
    sources: Sequence[Source],
    indexes: Sequence[DatasetIndex],
    output: str,
    resume: str,
    change_batch: bool,
    base_note: str | None,
    lock: Lock,
    profiled: Mapping[str, Any],
) -> TrainSummary:
    """The training itself, in an output that nobody else writes."""
    if resume == "auto":  # what a killed job left half written
        checkpoints.prune(output, recipe.train.keep_checkpoints)
    start = starting_point(recipe, sources, indexes, output, resume, change_batch)
    if base_note and not start:
        say(base_note)
    for line in start.changes if start else ():
        say(line)
    recipe = start.recipe if start else recipe
    with doing("counting the network's operations"), ThreadPoolExecutor(1, "flops") as pool:
        flops = pool.submit(training_flops, recipe, indexes)
        _join_cluster(recipe)
    if recipe.train.automatic:
        with doing("choosing what fits"):
            recipe, line = settled(recipe, _accelerator(recipe))
        say(line)
    if recipe.train.canary and (not start or start.other_data):
        for index in indexes:
            with doing("making samples of the dataset again"):
                line = _canary(index, recipe)
            say(line)
    before = start.before if start else None
    profile = dataset_profile(indexes[0])
    progress = Progress(recipe, output, name_of(sources), digest_of(indexes), profile=profile, previous=before)
    # Beside this process, without which there is no job: nodes that may be taken are no place for it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
    ending = Ending(lock, mailbox.stop.remote)
    filesystem, path = storage.arrow_filesystem(output)
    train_settings = recipe.train
    trainer = _Trainer(
        rank.work,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "sources": sources,
            "output": output,
            "start": start.card.uri if start else None,
            "other_data": start is not None and start.other_data,
            "shards": [len(index.shards) for index in indexes],
            "flops": flops.result(),
            "mailbox": mailbox,
            **profiled,
            "known": _known_states(recipe),
            "watched": os.environ.get(_WATCHER, _ray_train()[_WATCHER]) == "1",
        },
        torch_config=TorchConfig(backend="nccl" if train_settings.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train_settings.workers,
            use_gpu=train_settings.gpus_per_worker > 0,
            resources_per_worker=_resources(recipe),
        ),
        run_config=RunConfig(
            name=checkpoints.RUN,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=train_settings.keep_checkpoints),
            failure_config=FailureConfig(max_failures=train_settings.max_failures),
        ),
    )
    trainer.ending = ending
    workers = f"{train_settings.workers} worker" + ("s" if train_settings.workers > 1 else "")
    try:
        with (
            _environment(_ray_train()),
            ending.listening(),
            doing(f"starting {workers}") as work,
            _following(mailbox, progress, lock, ending, work),
        ):
            trainer.fit()
        _raise_fault(mailbox)
    except (SystemExit, KeyboardInterrupt):  # ended at once; Ray Train makes the former of an interrupt
        if lock.lost:
            lock.check()
        progress.fail("KILLED")
        ending.leave()
    except Exception as error:
        with suppress(Exception):  # before anything else is written: half a checkpoint may be what fills a disk
            checkpoints.prune(output, train_settings.keep_checkpoints)
        progress.fail()
        _raise_fault(mailbox)
        if isinstance(error, ray.train.TrainingFailedError):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            text = f"training failed after {train_settings.max_failures} restarts: {lines[-1]}"
            raise RunError(text) from error
        raise
    except BaseException:
        progress.fail()
        raise
    lock.check()
    with doing("closing the run"):
        with storage.tidying(f"{output}: checkpoints before the last {train_settings.keep_checkpoints}"):
            checkpoints.prune(output, train_settings.keep_checkpoints)
        latest = checkpoints.latest(output)
        if (ending.asked or ending.step) and (latest is None or latest.step < train_settings.max_steps):
            progress.fail("KILLED")
            why = ending.asked.name if ending.asked else f"train.stop_file {train_settings.stop_file}"
            at = f"at step {latest.step}, which is saved" if latest else "before anything was saved"
            say(f"{output}: ended {at} ({why}); the same command with --resume auto continues there")
            ending.leave()
        if latest is None:
            raise RunError(
                f"{output}: no checkpoint is complete there: the storage has lost files that were written to it"
            )
        return progress.finish(latest.uri)


def _ray_train() -> dict[str, str]:
    """What Ray Train is told, unless the environment says otherwise."""
    watched = "1" if os.environ.get("RAY_ADDRESS") else "0"  # else a process more, for nodes that nobody takes
    return {_WATCHER: watched, _CHDIR: "0"}


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Variables that are not set have these values meanwhile."""
    missing = defaults.keys() - os.environ.keys()
    os.environ.update({name: defaults[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's own, which ends a training at once when it is interrupted: here that is the second choice."""

    ending: Ending

    def _register_sigint_handler(self, controller: Any) -> None:
        super()._register_sigint_handler(controller)
        self.ending.take_over()


def _check_packages(recipe: Recipe) -> None:
    """See that what only some settings need is installed."""
    wanted = {
        "bitsandbytes": ("train.optimizer is adam8bit", recipe.train.optimizer == "adam8bit"),
        "tensorboardX": ("train.tensorboard is true", recipe.train.tensorboard),
    }
    for package, (setting, asked) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise InputError(f"{setting}, which needs the package {package}: pip install {package}")


def _resources(recipe: Recipe) -> dict[str, float]:
    train = recipe.train
    wanted = {"CPU": train.cpus_per_worker}
    if train.gpus_per_worker:
        wanted["GPU"] = train.gpus_per_worker
    return wanted | ({train.resource: 1.0} if train.resource else {})


def _join_cluster(recipe: Recipe) -> None:
    """Connect to Ray and see that the worker group can be placed at all; it would wait for ever otherwise.

    A cluster that may grow is asked for the nodes that are missing, and waited for ``data.wait_for_nodes`` seconds.
    """
    workers = recipe.train.workers
    # A private Ray counts logical CPUs, so that more workers than cores are slow but possible.
    connect(cpus=math.ceil(workers * recipe.train.cpus_per_worker))
    wanted = " and ".join(f"{each:g} {name}" for name, each in _resources(recipe).items())
    if joined() and _room(recipe) < workers and recipe.data.wait_for_nodes:
        ask_for_nodes(
            [_resources(recipe)] * workers,
            lambda: _room(recipe) >= workers,
            recipe.data.wait_for_nodes,
            lambda: f"waiting for {workers} times {wanted}, of which the nodes have room for {_room(recipe):g}",
        )
    there = ray.cluster_resources()
    keys = {"CPU": "train.cpus_per_worker", "GPU": "train.gpus_per_worker"}
    for name, each in _resources(recipe).items():
        if there.get(name, 0) < workers * each:
            raise InputError(
                f"train.workers is {workers} with {each:g} {name} each, but the cluster has {there.get(name, 0):g} "
                f"{name}; lower train.workers or {keys.get(name, 'change train.resource')}, or add nodes"
            )
    if (places := _room(recipe)) < workers:
        raise InputError(
            f"train.workers is {workers} with {wanted} each on one node, but the nodes have room for {places:g}; lower "
            "train.workers or train.cpus_per_worker, or add nodes"
        )


def _accelerator(recipe: Recipe) -> Accelerator | None:
    """Of the accelerators that workers may get that of the least memory; None: they compute on CPUs."""
    if not recipe.train.gpus_per_worker:
        return None
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    look = ray.remote(num_cpus=0, num_gpus=1)(this_accelerator)
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    found: list[Accelerator] = ray.get([look.options(scheduling_strategy=node).remote() for node in there])
    return min(found, key=lambda known: known.memory)


def _room(recipe: Recipe) -> float:
    """How many workers the nodes have room for."""
    return sum(_places(node["Resources"], _resources(recipe)) for node in ray.nodes() if node["Alive"])


def _places(node: Mapping[str, float], wanted: Mapping[str, float]) -> float:
    """How many workers a node has room for."""
    return min((node.get(name, 0) // each for name, each in wanted.items() if each), default=math.inf)


def _canary(index: DatasetIndex, recipe: Recipe) -> str:
    """`check_canary` in a process of its own, on an accelerator where the recipe encodes on one."""
    gpus = recipe.data.encode_gpus if ray.cluster_resources().get("GPU", 0) >= recipe.data.encode_gpus else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=1)(check_canary)
    try:
        line: str = ray.get(task.remote(index, recipe))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, InputError | RunError) else error) from None
    return line


def _known_states(recipe: Recipe) -> KnownStates:
    """What encoders make that no rank will load, from a process that ends with it."""
    if {TEXT_STATES, *IMAGE_TOKENS}.isdisjoint(stored_fields(recipe)):
        return KnownStates()
    task = ray.remote(num_cpus=1, max_calls=1)(KnownStates.of)
    with doing("encoding the empty prompt"):
        known: KnownStates = ray.get(task.remote(recipe))
    return known


def _raise_fault(mailbox: Any) -> None:
    fault = ray.get(mailbox.fault.remote())
    if fault:
        raise (InputError if fault[0] == "InputError" else RunError)(fault[1])


@contextmanager
def _following(mailbox: Any, progress: Progress, lock: Lock, ending: Ending, work: Work) -> Iterator[None]:
    """Hand the mailbox's events to ``progress`` from a thread, until the block ends and none are left.

    Once the lock is lost, nothing more is written, and the block is interrupted as a person would do it.
    """
    over = threading.Event()

    def follow() -> None:
        preload()
        last = False
        while not last:
            last = over.wait(0.3)
            if lock.lost:
                os.kill(os.getpid(), signal.SIGINT)
                return
            ending.follow()
            progress.wait()
            for event in ray.get(mailbox.take.remote()):
                work.what, work.patience = "training", 9.0  # reports of steps say more
                found = pickle.loads(event)
                if isinstance(found, Resumed):  # its networks and data are there: nothing of its input is refused now
                    ending.begin()
                    progress.track(found.step)
                if isinstance(found, Notice) and found.ends:
                    ending.step = found.step
                progress.handle(found)

    with ThreadPoolExecutor(1, "progress") as pool:
        following = pool.submit(follow)
        try:
            yield
        finally:
            over.set()
            following.result()
