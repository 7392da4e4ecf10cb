"""The connection to Ray: joining a cluster or starting one, and what its workers report."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray._private import ray_constants
from ray.data import DataContext

from cinemo import cache, diagnostics, s3, web
from cinemo.config import Recipe
from cinemo.data.precompute import pools
from cinemo.data.precompute.progress import Figures, Meter, Progress
from cinemo.progress import doing
from cinemo.types import InputError, RunError

log = logging.getLogger(__name__)

_WORKER_ENVIRONMENT = {
    # Ray would otherwise hide the accelerator from tasks that ask for none of it, with a warning in every worker.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    **s3.ENVIRONMENT,
}
_SHARED_MEMORY = Path("/dev/shm")
_OBJECT_STORE_LIMIT = 2 << 30
_METER_SECONDS = 2.0
_TRIES = 3  # to start a Ray, which gives a node half a minute: on a busy machine that is little


def connect(cpus: int = 1) -> None:
    """Join the cluster of ``RAY_ADDRESS`` (set under ``ray job submit``), or start a private one on this machine.

    A second call in the same process does nothing. ``CINEMO_DEBUG=1`` shows what the workers print.

    Args:
        cpus: a private one counts at least so many logical CPUs, also where the machine has fewer cores.
    """
    # A shard's fields, or a picture at every value of a control, may take longer than the half hour after which Ray
    # takes a job for stuck. What hangs here has time limits of its own.
    DataContext.get_current().execution_no_progress_timeout_s = -1
    if ray.is_initialized():
        return
    for name, value in _WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        passed = {name: os.environ[name] for name in (s3.PATIENCE, cache.LIMIT, *web.SETTINGS) if name in os.environ}
        with doing("joining the Ray cluster"):
            ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": _WORKER_ENVIRONMENT | passed})
        return
    memory = _OBJECT_STORE_LIMIT
    if _SHARED_MEMORY.is_dir():
        memory = min(memory, shutil.disk_usage(_SHARED_MEMORY).free // 2)
    with doing("starting Ray"), _on_loopback():
        for tries_left in reversed(range(_TRIES)):
            others = psutil.Process().children(recursive=True)
            try:
                started = ray.init(
                    address="local",  # never a cluster that happens to run on this machine
                    num_cpus=max(cpus, os.cpu_count() or 1),
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=bool(os.environ.get("CINEMO_DEBUG")),
                    object_store_memory=memory,
                )
                break
            except Exception as error:  # Ray has no class of its own for it
                if "timed out during startup" not in str(error):
                    raise
                for process in psutil.Process().children(recursive=True):  # Ray leaves them
                    if process not in others:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            process.kill()
                if not tries_left:
                    raise RunError(
                        f"Ray did not start within half a minute, {_TRIES} times: this machine has too much to do, or "
                        "too little memory; start again when it has less, or set RAY_ADDRESS to a Ray that runs"
                    ) from None
    diagnostics.logs_are_in(os.path.join(started.address_info["session_dir"], "logs"))


def disconnect(patience: float = 30.0) -> None:
    """Leave Ray, and end a private one.

    Ray waits for its own threads and processes without a limit (ray-project/ray#44836). After ``patience`` seconds the
    processes of a private Ray are killed, which is all that was left to do, and this process ends with 0 when it comes
    to its end.
    """
    others = psutil.Process().children(recursive=True)
    if ended_within(patience, ray.shutdown):
        return
    faulthandler.dump_traceback()
    log.error("Ray has not ended within %g s; its processes are killed (%s)", patience, diagnostics.where())
    for process in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    atexit.register(os._exit, 0)  # before Ray's own handler, which would wait as long


def ended_within(seconds: float, work: Callable[[], object]) -> bool:
    """Do ``work`` in a thread; whether it has ended in time. One that has not goes on, and keeps no process alive."""
    thread = threading.Thread(target=work, name="cinemo-ending", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts meanwhile does as on macOS: its processes talk over the loopback address, where they would
    listen on every interface. They inherit the setting; this process may join or start another Ray later.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    set_by_user = os.environ.get(name)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[name] = False, "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[name]
        if set_by_user is not None:
            os.environ[name] = set_by_user


@contextlib.contextmanager
def watch(
    clips: int, shards: int, recipe: Recipe, listener: Callable[[Figures], None] | None = None
) -> Iterator[tuple[Progress, Any]]:
    """The progress of a run, and the handle that its workers report to."""
    connect()
    pools.wait_for_nodes(recipe)
    found = pools.pools(recipe)
    meter = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(Meter).remote()

    def read() -> Mapping[str, Mapping[str, float]] | None:
        try:
            figures: Mapping[str, Mapping[str, float]] = ray.get(meter.read.remote(), timeout=_METER_SECONDS)
            progress.capacity.update(pools.pools(recipe).capacity)  # nodes come and go
            return figures
        except ray.exceptions.RayError:  # being started, or its node went away
            return None

    try:
        with Progress(
            clips,
            shards,
            found.capacity,
            read,
            listener,
        ) as progress:
            yield progress, meter
    finally:
        ray.kill(meter)


def report(meter: Any, stage: str, rows: pa.Table, views: int, seconds: Mapping[str, tuple[str, ...]]) -> None:
    """Tell the meter, and wait for nothing."""
    if meter is None:
        return
    spent = {name: sum(pc.sum(rows[column]).as_py() or 0.0 for column in columns) for name, columns in seconds.items()}
    own = [where == "encode" for where in rows["stage"].to_pylist()]
    reasons = Counter(
        reason
        for reason, encoding, view in zip(rows["reason"].to_pylist(), own, rows["view"].to_pylist(), strict=True)
        if reason and view == 0 and encoding == (stage == "encode")
    )
    meter.add.remote(stage, rows.num_rows / views, spent, dict(reasons))


def results(graph: Any) -> Iterator[dict[str, Any]]:
    """Rows of a Ray Data graph as they are made.

    Raises:
        InputError, RunError: what a worker met and a person can mend, such as storage that does not answer.
    """
    try:
        for table in graph.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from table.to_pylist()
    except ray.exceptions.RayError as error:
        raise cause(error) from error


def cause(error: Exception) -> Exception:
    """What a worker raised, in one line; the error as it is where that cannot be told. Ray keeps it as text only."""
    names = "RunError|NoRoom|InputError|AccessDenied|BadName|BadPlace|NoBucket|NotSupported|PastEnd"
    found = re.findall(rf"^cinemo\.\w+\.({names}): (.+)$", str(error), re.MULTILINE)
    if not found:
        before, is_wrapped, _ = str(error).partition("\n\nThe above exception was the direct cause")
        return RuntimeError(f"in a worker: {before.splitlines()[-1]}") if is_wrapped else error
    kind, message = found[-1]
    return (RunError if kind in ("RunError", "NoRoom") else InputError)(message)
