"""A bundle in MLflow's model registry, with the training run that made it."""

from __future__ import annotations

from pathlib import Path

from cinemo import tracking
from cinemo.bundle import read_card
from cinemo.training.report.progress import read_run
from cinemo.types import InputError


def tracked_run(checkpoint: str) -> tuple[str, str]:
    """(MLflow run, tracking URI) of the training that wrote a checkpoint, by its URI (it may be gone by now).

    Raises:
        InputError: that training was not tracked, or its run cannot be reached from here.
    """
    output = checkpoint.removesuffix("/").rsplit("/", 2)[0]  # <output>/train/checkpoint_...
    run = read_run(output) or {}
    if not run.get("mlflow_run"):
        raise InputError(f"checkpoint {checkpoint}: {output} has no MLflow run; leave --register out")
    tracking.find_run(run["mlflow_uri"], run["mlflow_run"])
    return run["mlflow_run"], run["mlflow_uri"]


def register(bundle: str, name: str) -> str:
    """Store an exported bundle with the MLflow run of its training and make it the newest version of model ``name``.

    Returns a line about it.

    Raises:
        InputError: not a bundle of a checkpoint, see also `tracked_run` and `cinemo.tracking.register_bundle`.
    """
    card = read_card(bundle)
    if "checkpoint" not in card.provenance:
        raise InputError(f"{bundle}: was not made from a checkpoint; expected a bundle of export.py --checkpoint")
    run_id, uri = tracked_run(card.provenance["checkpoint"])
    known = {"digest": card.digest, "recipe": card.recipe.name}
    known |= {name: str(card.provenance[name]) for name in ("step", "dataset", "checkpoint") if name in card.provenance}
    version = tracking.register_bundle(Path(bundle), run_id, uri, name, known)
    return f"model {name} version {version} at {uri}"
