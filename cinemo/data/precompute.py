"""The Ray Data graph that turns a manifest into a dataset, and the connection to Ray that it runs on."""

from __future__ import annotations

import logging
import os
import shutil

import ray

_WORKER_ENVIRONMENT = {
    # Ray would otherwise hide the accelerator from tasks that ask for none of it, with a warning in every worker.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_OBJECT_STORE_LIMIT = 2 << 30


def connect() -> None:
    """Join the cluster of ``RAY_ADDRESS`` (set under ``ray job submit``), or start a private one on this machine.

    A second call in the same process does nothing.
    """
    if ray.is_initialized():
        return
    for name, value in _WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": _WORKER_ENVIRONMENT})
    else:
        # "local" never joins a cluster that happens to run on this machine.
        ray.init(
            address="local",
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=bool(os.environ.get("CINEMO_DEBUG")),
            object_store_memory=min(_OBJECT_STORE_LIMIT, shutil.disk_usage("/dev/shm").free // 2),
        )
