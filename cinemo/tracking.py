"""MLflow, and the only place that knows it: a run with all that belongs to it, and the registry of models.

Where runs go: ``$MLFLOW_TRACKING_URI`` if set; else ``mlflow.db`` and ``mlartifacts/`` inside a local output directory;
else, for an s3:// output, the same two in the current directory. mlflow is imported when a run starts, not before.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cinemo import __version__, cache, storage
from cinemo.config import Recipe
from cinemo.types import InputError

EXPERIMENT = "cinemo"
_SHOWN = 80  # of a value that changed
_FLUSH_COUNT, _FLUSH_SECONDS = 200, 5.0
_PARAM_LENGTH, _BATCH = 500, 100  # MLflow servers before 2.8 refuse longer values; 100 parameters per request
_SQLITE = "sqlite:///"
_MODEL = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>\d+|latest)|@(?P<alias>[^/@]+))")
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # never there, or deleted in the page
# A dead server is noticed within seconds and a silent one within two minutes; mlflow's own patience is a quarter hour.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


def locate(output: str) -> tuple[str, str | None, str]:
    """(tracking URI, artifact root or None where a server decides, the line that opens it) of an output directory."""
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if server:
        if server.startswith(("http://", "https://")):
            return server, None, f"mlflow: {server}, experiment {EXPERIMENT}"
        return server, None, f"mlflow ui --backend-store-uri {server}"
    root = Path.cwd() if storage.is_remote(output) else Path(storage.absolute(output))
    uri = f"{_SQLITE}{root / 'mlflow.db'}"
    hint = f"mlflow ui --backend-store-uri {uri}"
    if storage.is_remote(output):
        hint += "  (local: set MLFLOW_TRACKING_URI to track runs with an s3:// output on a server)"
    return uri, (root / "mlartifacts").as_uri(), hint


def flatten(recipe: Recipe) -> dict[str, str]:
    """Every recipe value under its dotted key, as text."""
    found: dict[str, str] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else key, inner)
        else:
            found[prefix] = str(value)

    visit("", recipe.model_dump(mode="json"))
    return found


def changes(old: Recipe, new: Recipe) -> dict[str, str]:
    """What differs between two recipes: by dotted key ``old -> new``."""
    before, after = flatten(old), flatten(new)
    differing = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return {key: f"{_short(before.get(key))} -> {_short(after.get(key))}" for key in differing}


def _short(value: str | None) -> str:
    text = "nothing" if value is None else value
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def run_name(kind: str, recipe: str, *places: str) -> str:
    """What tells a run apart in a list of runs: kind, recipe, the last names of its places, and the time (UTC)."""
    names = [place.rstrip("/").rpartition("/")[2] for place in places]
    return " ".join([kind, recipe, *names, time.strftime("%Y-%m-%d %H:%M", time.gmtime())])


def code_tags() -> dict[str, str]:
    """The package's version and, where it runs from a git checkout, the commit: tags of every run."""
    tags, root = {"cinemo.version": __version__}, Path(__file__).parent.parent
    if (root / ".git").exists():  # else the commit may be that of whatever lies around an installed package
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
            tags["mlflow.source.git.commit"] = done.stdout.strip()
    return tags


def preload() -> None:
    """Import mlflow, which takes seconds, before it is needed; where it cannot be imported, `Run` will say so."""
    with contextlib.suppress(Exception):
        importlib.import_module("mlflow.tracking")


class Run:
    """One MLflow run, started or continued. A new one carries `code_tags`.

    Not thread-safe; metrics are kept and sent in batches (a call per metric is a hundred times dearer). The steps
    of a metric only ever grow: what a resumed training does again, from its checkpoint on, is there already and is left
    out.

    Args:
        output: output directory of the job (local or s3://), see `locate`.
        name: what the run is called in the list of runs.
        run_id: continue this run; a new one is started where it does not exist any more.
        params: written once, for a new run.
        parent: the run in which a new one is nested.
    """

    def __init__(
        self,
        output: str,
        name: str,
        run_id: str | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
    ) -> None:
        for variable, value in _PATIENCE.items():
            os.environ.setdefault(variable, value)
        self.uri, artifacts, self.hint = locate(output)
        if artifacts and not storage.is_remote(output):
            storage.local_path(output).mkdir(parents=True, exist_ok=True)
        if artifacts:
            _make_database(Path(self.uri.removeprefix(_SQLITE)))
        self._client = _client(self.uri)
        self._metrics: list[Any] = []
        self._reached: dict[str, int] = {}
        self._flushed = time.monotonic()
        self.run_id = (self._continue(run_id) if run_id else None) or self._start(name, artifacts, params or {}, parent)
        for key, value in (tags or {}).items():
            self._client.set_tag(self.run_id, key, value)

    def _continue(self, run_id: str) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(run_id, status="RUNNING")
            known = self._client.get_run(run_id).data.to_proto().metrics  # the latest of each, with its step
        except MlflowException as error:
            if error.error_code in _GONE:
                return None
            raise
        self._reached = {metric.key: metric.step for metric in known}
        return run_id

    def _start(self, name: str, artifacts: str | None, params: Mapping[str, str], parent: str | None) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            try:
                experiment_id = self._client.create_experiment(EXPERIMENT, artifact_location=artifacts)
            except MlflowException:  # another job made it between the two calls
                experiment_id = self._client.get_experiment_by_name(EXPERIMENT).experiment_id
        else:
            experiment_id = experiment.experiment_id
        tags = code_tags() | ({"mlflow.parentRunId": parent} if parent else {})
        run_id = str(self._client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
        entries = [Param(key, value[:_PARAM_LENGTH]) for key, value in sorted(params.items())]
        for start in range(0, len(entries), _BATCH):
            self._client.log_batch(run_id, params=entries[start : start + _BATCH])
        return run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the finite values of ``metrics`` at ``step``; sent with the next batch."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for key, value in metrics.items():
            if math.isfinite(value) and step > self._reached.get(key, -1):
                self._metrics.append(Metric(key, float(value), now, step))
                self._reached[key] = step
        if len(self._metrics) >= _FLUSH_COUNT or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def log_all(self, entries: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """`log` for each (step, metrics)."""
        for step, metrics in entries:
            self.log(step, metrics)

    def flush(self) -> None:
        """Send what was kept."""
        for start in range(0, len(self._metrics), 1000):
            self._client.log_batch(self.run_id, metrics=self._metrics[start : start + 1000])
        self._metrics = []
        self._flushed = time.monotonic()

    def dataset(self, uri: str, digest: str, profile: Mapping[str, Any], context: str = "training") -> None:
        """Note the dataset that the run reads; the same one twice is noted once.

        Args:
            digest: of its content, at most 36 characters.
            profile: anything else worth knowing, JSON values.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        name = uri.rstrip("/").rpartition("/")[2]
        kind = "s3" if storage.is_remote(uri) else "local"
        entry = Dataset(name, digest, kind, json.dumps({"uri": uri}), profile=json.dumps(profile, sort_keys=True))
        self._client.log_inputs(self.run_id, [DatasetInput(entry, [InputTag("mlflow.data.context", context)])])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file of any kind (figure, video, table) with the run."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def text(self, name: str, content: str) -> None:
        """Store a small text file with the run, ``name`` being its path there."""
        self._client.log_text(self.run_id, content, name)

    def finish(self, status: str = "FINISHED") -> None:
        """Send the rest and end the run: ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self.flush()
        self._client.set_terminated(self.run_id, status)


def find_run(uri: str, run_id: str) -> None:
    """See that a run can be reached.

    Raises:
        InputError: it cannot.
    """
    from mlflow.exceptions import MlflowException

    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).is_file():  # mlflow would make an empty one
        raise InputError(f"MLflow {uri}: no such file; expected the database of run {run_id} on this machine")
    try:
        _client(uri).get_run(run_id)
    except MlflowException as error:
        raise InputError(f"MLflow {uri}: run {run_id} cannot be read ({str(error).splitlines()[0]})") from None


def register_bundle(directory: Path, run_id: str, uri: str, name: str, tags: Mapping[str, str] | None = None) -> int:
    """Store a bundle's files with the run that made them and enter them in the model registry.

    Args:
        directory: the bundle.
        uri: where the run is, see `Run.uri`.
        name: of the registered model; made where there is none.

    Returns:
        the new version of the model, which ``models:/NAME/VERSION`` (or ``models:/NAME/latest``) names from then on.

    Raises:
        InputError: the run cannot be reached, or the name is refused.
    """
    from mlflow.exceptions import MlflowException

    find_run(uri, run_id)
    client = _client(uri)
    try:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        folder = f"bundle-{(tags or {}).get('step', 'model')}"
        client.log_artifacts(run_id, str(directory), folder)
        source = f"{client.get_run(run_id).info.artifact_uri}/{folder}"
        made = client.create_model_version(name, source, run_id, tags=dict(tags or {}))
    except MlflowException as error:
        raise InputError(f"MLflow {uri}: model {name!r}: {str(error).splitlines()[0]}") from None
    return int(made.version)


def pinned(location: str) -> str:
    """``models:/NAME/latest`` or ``models:/NAME@ALIAS`` as the ``models:/NAME/VERSION`` that it means right now.

    The registry is that of ``$MLFLOW_TRACKING_URI``.

    Raises:
        InputError: no such model or version there, no registry, or it cannot be reached.
    """
    version = _model_version(location)
    return f"models:/{version.name}/{version.version}"


def download_bundle(location: str) -> Path:
    """The files of a registered bundle, fetched once on a node and kept as `cinemo.cache.keep` does.

    Args:
        location: as `pinned` takes it.

    Raises:
        InputError: as `pinned`, or its files cannot be fetched.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    version = _model_version(location)
    # A version's files never change; two registries, or one that was made anew, may both have a version 1.
    origin = json.dumps([os.environ["MLFLOW_TRACKING_URI"], version.name, version.version, version.source])

    def fetch(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            try:
                fetched = download_artifacts(artifact_uri=version.source, dst_path=scratch)
            except (MlflowException, OSError) as error:
                raise InputError(f"{location}: its files cannot be fetched ({_first_line(error)})") from None
            os.replace(fetched, target)

    return cache.keep(cache.Download("bundle", f"{origin} {version.creation_timestamp}", 0, fetch))


def _model_version(location: str) -> Any:
    from mlflow.exceptions import MlflowException

    found = _MODEL.fullmatch(location)
    if found is None:
        raise InputError(f"{location}: expected models:/NAME/VERSION, models:/NAME/latest or models:/NAME@ALIAS")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise InputError(f"{location}: MLFLOW_TRACKING_URI is not set, so there is no registry to ask")
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).is_file():  # mlflow would make an empty one
        raise InputError(f"MLflow {uri}: no such file; expected the database that has {location}")
    for variable, value in _PATIENCE.items():
        os.environ.setdefault(variable, value)
    name, client = found["name"], _client(uri)
    try:
        if found["alias"]:
            return client.get_model_version_by_alias(name, found["alias"])
        if found["version"] != "latest":
            return client.get_model_version(name, found["version"])
        versions = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
        if versions:
            return versions[0]
    except MlflowException as error:
        raise InputError(f"MLflow {uri}: {location} cannot be read ({_first_line(error)})") from None
    raise InputError(f"MLflow {uri}: {location}: no version of {name!r} is registered there")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _make_database(path: Path) -> None:
    """The database with all its tables. MLflow makes them one by one and, killed meanwhile, cannot go on."""
    if path.exists():
        return
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent, ignore_cleanup_errors=True) as directory:
        part = Path(directory) / path.name
        _client(f"{_SQLITE}{part}").search_experiments(max_results=1)
        try:
            os.link(part, path)
        except FileExistsError:
            pass  # another job was faster
        except OSError:  # a file system without links
            os.replace(part, path)


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    for noisy in ("alembic", "mlflow"):  # after the import, which sets its own level
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)
