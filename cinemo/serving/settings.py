"""All settings of a server: flags of ``pipelines/serve.py``, and ``args`` of an application in Serve's config file."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cinemo import storage
from cinemo.bundle import BundleCard, check_takes_adapters, read_card
from cinemo.networks.adapters import digest, places
from cinemo.serving.haproxy import ProxyLimits
from cinemo.serving.http.signatures import read_secret
from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import JobStore, QueueLimits
from cinemo.serving.store.keys import KeyStore
from cinemo.serving.store.media import MediaStore
from cinemo.serving.store.results import Reuse
from cinemo.types import InputError

# As browsers write it: scheme, host, port where it is unusual.
_ORIGIN = re.compile(r"\*|https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(:\d{1,5})?")


class ServeSettings(BaseModel):
    """One server. Every process of it (HTTP replicas, animators, the autoscaler) is built from these values alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str = Field(description="folder written by pipelines/export.py, s3://, or models:/NAME/VERSION of MLflow")
    state: str = Field(".cinemo/serve", description="directory or s3:// for pictures and videos of jobs")
    database: str | None = Field(
        None, description="postgresql://... or sqlite:////absolute/path; if absent, serving.sqlite in --state"
    )
    http_replicas: int = Field(1, ge=1, description="processes that answer HTTP; any of them answers for any job")
    http_concurrency: int = Field(
        512, ge=1, description="requests in flight per HTTP replica, including event streams; others wait their turn"
    )
    min_replicas: int = Field(1, ge=0, description="minimum number of animators (processes that hold the model)")
    max_replicas: int = Field(
        1, ge=1, description="maximum number of animators; above --min-replicas the queue decides"
    )
    upscale_seconds: float = Field(
        10.0, ge=0, description="how long the queue must need another animator before one is added"
    )
    downscale_seconds: float = Field(
        300.0, ge=0, description="how long it must need fewer animators before one is drained and removed"
    )
    cpus: float | None = Field(
        None, ge=0, description="CPUs, and so threads, of an animator; if absent, what a node has, at most 8"
    )
    gpus: float | None = Field(
        None, ge=0, description="accelerators of an animator, fractions allowed; if absent, 1 where there is one"
    )
    max_batch: int = Field(4, ge=1, description="jobs that an animator denoises in one network call")
    max_joined: int = Field(8, ge=1, description="jobs that take turns in an animator's batches")
    max_queued: int = Field(64, ge=1, description="jobs that may wait before requests are refused")
    max_attempts: int = Field(3, ge=1, description="how many times a job is started before it fails, if animators die")
    lease_seconds: float = Field(
        30.0, gt=0, description="silence after which an animator counts as dead and its jobs go to another"
    )
    keep_seconds: float = Field(86400.0, gt=0, description="how long a finished job and its video are kept")
    drain_seconds: float = Field(
        30.0, ge=0, description="how long a stopping animator goes on finishing jobs; the rest return to the queue"
    )
    max_body_bytes: int = Field(20 * 2**20, ge=1024, description="maximum bytes of a request body")
    max_pixels: int = Field(40_000_000, ge=1, description="maximum pixels of a picture, checked before it is decoded")
    request_seconds: int = Field(
        10, ge=1, description="how long a request's headers and the first 16 KB of its body may take to arrive"
    )
    min_upload_rate: int = Field(
        16384, ge=1, description="bytes per second with which the rest of a body must arrive on average"
    )
    max_connections: int = Field(16384, ge=64, description="open connections; more wait to be accepted")
    connections_per_address: int = Field(
        512, ge=0, description="open connections from one address (IPv6: one /64); more are reset; 0 = no limit"
    )
    trusted_proxies: str = Field(
        "127.0.0.0/8,::1", description="networks of reverse proxies, separated by commas: no limit per address"
    )
    require_keys: bool = Field(False, description="answer only requests with an API key (see --add-key)")
    metrics: Literal["open", "key", "off"] = Field(
        "open", description="who may read /metrics: everybody, holders of a key, or nobody"
    )
    lora: str | None = Field(
        None, description="directory of LoRA adapters (of export.py --adapter) that requests may name"
    )
    reuse: Reuse = Field(
        "own",
        description="whose finished videos answer a request for the same again, seed included: those of the same key, "
        "all of this server's, or nobody's (off)",
    )
    sync_seconds: float = Field(
        300.0,
        gt=0,
        le=3600,
        description="how long POST /v1/videos/sync waits for its video before it answers with the job",
    )
    cors_origins: str | None = Field(
        None,
        description="origins of web pages elsewhere that may use the interface, such as https://a.example, with commas "
        "between; * = any",
    )
    webhook_secret: str | None = Field(
        None, repr=False, description="whsec_ and base64: signs webhooks, which are refused without it"
    )
    webhook_addresses: Literal["public", "any"] = Field(
        "public", description="where webhooks may go: public addresses at ports 80 and 443, or any, also private ones"
    )
    allow_urls: bool = Field(False, description="fetch pictures that requests give as a public URL")

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: str) -> str:
        for network in filter(None, map(str.strip, value.split(","))):
            ipaddress.ip_network(network)  # a ValueError says what is wrong
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_replicas < max(1, self.min_replicas):
            raise ValueError(f"max_replicas is {self.max_replicas}, expected at least min_replicas {self.min_replicas}")
        if self.max_joined < self.max_batch:
            raise ValueError(f"max_joined is {self.max_joined}, expected at least max_batch {self.max_batch}")
        if unclear := [origin for origin in self.origins if _ORIGIN.fullmatch(origin) is None]:
            raise ValueError(f"cors_origins: {unclear[0]!r} is no origin, expected one such as https://a.example, or *")
        if self.webhook_secret is not None:
            read_secret(self.webhook_secret)
        if self.database is None and storage.is_remote(self.state):
            raise ValueError(
                f"state {self.state} cannot hold the job database, expected database=postgresql://... as well"
            )
        return self

    @property
    def database_url(self) -> str:
        """The database of jobs and keys, as a URL."""
        return self.database or f"sqlite:///{storage.local_path(storage.absolute(self.state)) / 'serving.sqlite'}"

    @property
    def origins(self) -> tuple[str, ...]:
        """Those of ``cors_origins``, in small letters, as browsers send them."""
        return tuple(filter(None, (origin.strip().lower() for origin in (self.cors_origins or "").split(","))))

    @property
    def proxy_limits(self) -> ProxyLimits:
        """What the proxy lets clients take."""
        return ProxyLimits(
            connections=self.max_connections,
            per_address=self.connections_per_address,
            trusted=self.trusted_proxies,
            request_seconds=self.request_seconds,
            requests=self.http_replicas * self.http_concurrency,
        )

    def absolute(self) -> ServeSettings:
        """The same with absolute paths: replicas run in other working directories."""
        places = {
            name: storage.absolute(getattr(self, name)) for name in ("state", "bundle", "lora") if self._is_path(name)
        }
        return self.model_copy(update=places)

    def _is_path(self, name: str) -> bool:
        return getattr(self, name) is not None and ":/" not in getattr(self, name)


def parse_settings(values: dict[str, Any]) -> ServeSettings:
    """Settings of a mapping.

    Raises:
        InputError: an unknown name or a value out of range; the message names it as a flag.
    """
    try:
        return ServeSettings(**values)
    except ValidationError as error:
        fault = error.errors()[0]
        if not fault["loc"]:
            raise InputError(str(fault["msg"]).removeprefix("Value error, ")) from None
        flag = "--" + str(fault["loc"][0]).replace("_", "-")
        if fault["type"] == "missing":
            raise InputError(f"{flag}: required") from None
        raise InputError(f"{flag} {fault['input']!r}: {fault['msg']}") from None


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, ``http_options``) of the first application in a config file as ``serve run`` takes it.

    A bundle that ``deployments`` gives the animator (a rolling update, see cluster/serve.yaml) goes before ``args``.

    Raises:
        InputError: no such file, or not such a file.
    """
    try:
        content = yaml.safe_load(path.read_text())
        application = content["applications"][0]
        settings = dict(application.get("args") or {})
        for deployment in application.get("deployments") or ():
            if deployment["name"] == "animator" and (deployment.get("user_config") or {}).get("bundle"):
                settings["bundle"] = deployment["user_config"]["bundle"]
        return settings, dict(content.get("http_options") or {})
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise InputError(
            f"--config {path}: not a config file of Ray Serve; expected applications with args, like cluster/serve.yaml"
        ) from None


def open_store(settings: ServeSettings) -> JobStore:
    """The jobs and their media, made where they are missing.

    Raises:
        InputError, RunError: the database or the directory cannot be used.
    """
    limits = QueueLimits(
        max_queued=settings.max_queued,
        max_attempts=settings.max_attempts,
        keep_seconds=settings.keep_seconds,
        lease_seconds=settings.lease_seconds,
    )
    database = Database(settings.database_url)
    return JobStore(database, MediaStore(storage.join(settings.state, "media")), limits)


def open_keys(settings: ServeSettings) -> KeyStore:
    """The API keys; they lie in the database of the jobs."""
    return KeyStore(Database(settings.database_url))


def served_card(location: str, settings: ServeSettings) -> BundleCard:
    """The card of a bundle, with the adapters that it is served with.

    Raises:
        InputError: no bundle, no such directory of adapters, or the bundle takes none.
    """
    card = read_card(location)
    if settings.lora is None:
        return card
    adapters = {name: digest(path) for name, path in places(Path(settings.lora)).items()}
    if adapters:
        check_takes_adapters(card.recipe, location)
    return replace(card, adapters=adapters)
