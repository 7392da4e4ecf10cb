"""A model bundle: the one folder that holds all a server, a page or a notebook loads.

::

    model_index.json  recipe.json  motion.json  bundle.json
    unet/  vae/  [vae_temporal_decoder/]  text_encoder/  tokenizer/  [image_encoder/]  scheduler/

The layout is diffusers' own, with safetensors weights only. ``recipe.json`` names the encoders by their place inside
the bundle, ``motion.json`` says what a motion bucket means, and ``bundle.json`` holds where the weights came from and
the sha256 of every other file. The digest of a bundle is the hash over those hashes: equal content has an equal digest,
wherever and whenever it was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cinemo
from cinemo import cache, storage, tracking
from cinemo.config import MOTION_BUCKETS, DataConfig, DiffusionConfig, Recipe, SampleConfig
from cinemo.media.motion import MORE_MOTION, STILLER, MotionScale
from cinemo.methods import Encoders, Method, build_method, image_encoder_place, method_class
from cinemo.methods.quality import QualityTable
from cinemo.networks.adapters import Adapters
from cinemo.networks.adapters import load as load_adapters
from cinemo.networks.frozen import ImageEncoder, Statistics, TextEncoder, Vae, normalised
from cinemo.networks.latent_colours import latent_colours
from cinemo.networks.memory import keep_freed_memory
from cinemo.networks.tokenizer import Tokenizer
from cinemo.networks.weight_files import DIFFUSERS, TRANSFORMERS, WeightFiles
from cinemo.networks.weights import gather, resolve, save_network
from cinemo.progress import doing
from cinemo.recipes import parse_recipe
from cinemo.types import InputError, check_schema

RECORD = "bundle.json"
SCHEMA_VERSION = 1
CALIBRATION = "calibration.json"
QUALITY = "quality.json"
# Pickled or duplicate weights that published folders carry beside the safetensors file.
_NOT_COPIED = ("*.bin", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.fp16.*", "*.non_ema.*", ".*")


@dataclass(frozen=True)
class BundleCard:
    """What can be said of a bundle without loading its weights. ``quality``: where somebody measured it.
    ``adapters``: by name the sha256 of those that it is served with."""

    recipe: Recipe
    motion: MotionScale
    digest: str
    provenance: Mapping[str, Any]
    quality: QualityTable | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[str, Mapping[str, str]]:
        """What decides a video beside its request: the digest, and the adapters."""
        return self.digest, self.adapters


@dataclass(frozen=True)
class ModelBundle:
    """A loaded bundle.

    ``vae`` encodes and ``decoder`` decodes; they are the same unless the recipe names a decoder of its own.
    ``digest``: sha256 over the content. ``location``: where it was asked for.
    """

    recipe: Recipe
    method: Method
    vae: Vae
    decoder: Vae
    text: TextEncoder
    motion: MotionScale
    digest: str
    location: str
    image: ImageEncoder | None = None
    quality: QualityTable | None = None
    adapters: Adapters = field(default_factory=Adapters)

    @property
    def device(self) -> torch.device:
        return next(self.method.parameters()).device

    @cached_property
    def colours(self) -> torch.Tensor:
        """What `cinemo.networks.latent_colours` makes of the autoencoder, on the device; takes a second or a few."""
        return latent_colours(self.vae).to(self.device)

    @property
    def encoders(self) -> Encoders:
        """What the method may ask when it prepares a sampling."""
        return Encoders(self.vae, self.text, self.motion, self.image)


def save_bundle(
    directory: Path,
    recipe: Recipe,
    networks: Mapping[str, nn.Module],
    provenance: Mapping[str, Any],
    scale: str = MORE_MOTION,
) -> str:
    """Write a bundle and return its digest. A reader never sees half of one: it is staged beside and renamed.

    Args:
        directory: new, empty, or an older bundle that is replaced.
        recipe: the recipe of the run; its encoder locations say where the frozen networks are copied from.
        networks: of the recipe's method, by name, as float32: the weights to keep.
        provenance: JSON values that say where they came from (checkpoint, step, dataset fingerprint, ...).
        scale: of the network's motion ids, see `MotionScale`.

    Raises:
        InputError: ``directory`` holds something else than a bundle, or an encoder cannot be loaded.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: is a file; expected a new directory for the bundle")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / RECORD).is_file():
        raise InputError(f"{directory}: is not empty and not a bundle; choose another directory or empty it")
    parent = directory.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=parent))
    try:
        pipeline = method_class(recipe).__name__.removesuffix("Method") + "Pipeline"
        index: dict[str, Any] = {"_class_name": pipeline, "_cinemo_version": cinemo.__version__}
        for name, network in networks.items():
            save_network(network, staged / name)
            index[name] = [type(network).__module__, type(network).__name__]
        places: dict[str, Any] = {"flow": None}  # for precompute alone
        for field, (folder, library, usual) in _ENCODERS.items():
            location = getattr(recipe.encoders, field)
            if location is None or (field == "image_encoder" and field not in method_class(recipe).needs):
                continue
            _copy_component(location, staged / folder, field)
            if field.startswith("vae") and recipe.encoders.statistics:
                _normalise(staged / folder / "config.json", recipe.encoders.statistics)
            index[folder] = [library, _class_name(staged / folder, usual)]
            places[field] = folder
        _write_json(staged / "scheduler" / "scheduler_config.json", _scheduler_config(recipe.diffusion, recipe.sample))
        index["scheduler"] = ["diffusers", "DDIMScheduler"]
        _write_json(staged / "model_index.json", index)
        # The copied autoencoder carries the statistics itself.
        places |= {"normalize": False, "latents_mean": None, "latents_std": None}
        inside = recipe.model_copy(update={"encoders": recipe.encoders.model_copy(update=places)})
        (staged / "recipe.json").write_text(inside.to_json())
        try:
            _load_encoders(inside, staged, torch.device("cpu"), torch.bfloat16)
        except InputError as error:
            raise InputError(f"the encoders make no bundle: {str(error).replace(f'{staged}/', '')}") from error
        _write_json(staged / "motion.json", _motion_json(recipe.data, scale))
        files = {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in _files(staged)}
        digest = _digest(files)
        record = {"schema": SCHEMA_VERSION, "cinemo": cinemo.__version__, "digest": digest, "files": files}
        record |= {"provenance": dict(provenance)}
        _write_json(staged / RECORD, record)
        os.chmod(staged, 0o755)
        _swap(staged, directory)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return digest


def read_card(location: str | Path, full: bool = False) -> BundleCard:
    """The recipe, motion scale and digest of a bundle, after checking that its files are whole.

    Args:
        location: a directory, ``s3://``, or ``models:/`` as `tracking.pinned` takes it.
        full: also hash the weight files, whose size alone is checked otherwise.

    Raises:
        InputError: no bundle there, or a file of it is missing or damaged.
    """
    return _read_card(_localize(location), location, full)


def _read_card(root: Path, location: str | Path, full: bool) -> BundleCard:
    record = _read_record(root, location)
    files = record["files"]
    if _digest(files) != record["digest"]:
        raise InputError(
            f"bundle {location}: {RECORD} is damaged (its digest does not match its file list); export again"
        )
    for name, entry in sorted(files.items()):
        path = root / name
        if not path.is_file():
            raise InputError(f"bundle {location}: {name} is missing; export or fetch the bundle again")
        if path.stat().st_size != entry["bytes"]:
            raise InputError(
                f"bundle {location}: {name} is damaged ({path.stat().st_size} bytes, expected {entry['bytes']}); "
                "export or fetch the bundle again"
            )
        if (full or path.suffix == ".json") and _sha256(path) != entry["sha256"]:
            raise InputError(f"bundle {location}: {name} is damaged (sha256 differs); export or fetch the bundle again")
    recipe = parse_recipe(json.loads((root / "recipe.json").read_bytes()), f"bundle {location}: recipe.json")
    motion = json.loads((root / "motion.json").read_bytes())
    if motion.get("scale") not in (MORE_MOTION, STILLER):
        raise InputError(
            f"bundle {location}: motion.json says {motion.get('scale')!r}, expected {MORE_MOTION!r} or {STILLER!r}"
        )
    calibration = _kept_calibration(root, record["digest"]) or motion["calibration"]
    scale = MotionScale(tuple(motion["bucket_edges"]), motion["metric"], calibration, motion["scale"])
    quality = _kept_quality(root, record["digest"])
    return BundleCard(recipe, scale, record["digest"], record["provenance"], quality)


def keep_calibration(location: str | Path, calibration: Mapping[str, Any]) -> None:
    """Lay measured motion (`cinemo.evaluation.calibration`) beside a bundle's files, for `MotionScale.calibration`.

    It is no part of the bundle's digest: measuring a model does not make it another one.

    Args:
        calibration: with ``bundle``, the digest that it was measured on.

    Raises:
        InputError: the bundle cannot be written, or it is another one.
    """
    digest = read_card(location).digest
    if calibration["bundle"] != digest:
        raise InputError(
            f"bundle {location}: its digest is {digest[:12]}, but the calibration is of {calibration['bundle'][:12]}"
        )
    keep_beside(location, CALIBRATION, json.dumps(dict(calibration), indent=2).encode() + b"\n")


def keep_quality(location: str | Path, table: QualityTable) -> None:
    """Lay a table of qualities beside a bundle's files; like a calibration it is no part of its digest.

    Raises:
        InputError: the bundle cannot be written, or it is another one.
    """
    digest = read_card(location).digest
    if table.bundle != digest:
        raise InputError(f"bundle {location}: its digest is {digest[:12]}, but the table is of {table.bundle[:12]}")
    keep_beside(location, QUALITY, json.dumps(table.to_json(), indent=2).encode() + b"\n")


def keep_beside(location: str | Path, name: str, content: bytes) -> None:
    """Lay a file beside a bundle's own, which is no part of its digest.

    Raises:
        InputError: the bundle cannot be written, or is a version of a registry, which nobody changes.
    """
    _check_changeable(location)
    storage.write_bytes(storage.join(str(location), name), content)


def check_beside(location: str | Path) -> None:
    """Raise what `keep_beside` would, before there is anything to keep."""
    _check_changeable(location)
    storage.check_writable(str(location))


def _check_changeable(location: str | Path) -> None:
    if str(location).startswith("models:/"):
        raise InputError(f"bundle {location}: a registered version is never changed; evaluate the folder it came from")


def load_bundle(
    location: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    full: bool = False,
    lora: str | None = None,
) -> ModelBundle:
    """Load a bundle for sampling: the method in evaluation mode and the frozen encoders, on ``device`` in ``dtype``.

    Args:
        device: a GPU where there is one, else the CPU, unless given.
        dtype: float32 on a CPU and bfloat16 elsewhere, unless given; there, networks stored in float16 stay in it.
        full: as `read_card`.
        lora: a directory of LoRA adapters that requests may name (`cinemo.networks.adapters`).

    Raises:
        InputError: as `read_card`, there is no such device, or an adapter does not fit.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device}: not usable here ({str(error).splitlines()[0]})") from None
    stored = dtype is None and device.type != "cpu"
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    if device.type == "cpu":
        keep_freed_memory()
    with doing("loading the model"):
        root = _localize(location)
        card = _read_card(root, location, full)
        kind = method_class(card.recipe)
        kept = None if stored else dtype
        networks = {part: kind.load_network(card.recipe, part, str(root / part), kept) for part in kind.parts}
        for network in networks.values() if stored else ():
            if next(network.parameters()).dtype != torch.float16:
                network.to(dtype)
        method = build_method(card.recipe, networks).to(device).eval().requires_grad_(False)
        adapters = load_adapters(Path(lora)) if lora else Adapters()
        adapters.attach(method.networks)
        if adapters.found:
            check_takes_adapters(card.recipe, location)
        if card.recipe.compile:
            method.compile_networks(card.recipe.compile == "regional")
        vae, decoder, text, image = _load_encoders(card.recipe, root, device, dtype)
    motion, digest, quality = card.motion, card.digest, card.quality
    return ModelBundle(card.recipe, method, vae, decoder, text, motion, digest, str(location), image, quality, adapters)


def check_takes_adapters(recipe: Recipe, location: str | Path) -> None:
    """Raise `InputError` where a bundle with this recipe cannot be asked with LoRA adapters."""
    if recipe.compile:
        raise InputError(f"bundle {location}: its network is compiled, which no adapter is; set compile=false")


def load_tokenizer(location: str | Path, recipe: Recipe) -> Tokenizer:
    """The tokenizer of a bundle with this recipe; no weights are read. Raises `InputError`."""
    root = _localize(location)
    return Tokenizer(str(root / str(recipe.encoders.tokenizer)), str(root / str(recipe.encoders.text_encoder)))


# Field of `EncodersConfig` -> (folder inside the bundle, library and class that model_index.json names; the class where
# the component's own files do not say it).
_ENCODERS = {
    "vae": ("vae", "diffusers", "AutoencoderKL"),
    "vae_decoder": ("vae_temporal_decoder", "diffusers", "AutoencoderKL"),
    "text_encoder": ("text_encoder", "transformers", "CLIPTextModel"),
    "tokenizer": ("tokenizer", "transformers", "CLIPTokenizer"),
    "image_encoder": ("image_encoder", "transformers", "CLIPVisionModel"),
}


def _copy_component(location: str, target: Path, field: str) -> None:
    """Copy an encoder's folder. Weights that are not one plain safetensors file already become one."""
    source = resolve(location)
    if not source.is_dir():
        raise InputError(f"encoder {location}: is a file; expected a directory in diffusers layout")
    names = DIFFUSERS if field.startswith("vae") else TRANSFORMERS
    files = None if field == "tokenizer" else WeightFiles.find(source, f"encoder {location}", *names)
    gathered = files is not None and files.paths != (source / names[0],)
    ignored = (*_NOT_COPIED, "*.safetensors", "*.index*.json") if gathered else _NOT_COPIED
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*ignored), copy_function=shutil.copyfile)
    if files and gathered:
        gather(files, target / names[0], f"encoder {location}")


def _load_encoders(
    recipe: Recipe, root: Path, device: torch.device, dtype: torch.dtype
) -> tuple[Vae, Vae, TextEncoder, ImageEncoder | None]:
    """Autoencoder, decoder, text and image encoder of a bundle's recipe."""
    kind, places = method_class(recipe), recipe.encoders
    vae = Vae(str(root / places.vae), device, dtype)
    decoder = Vae(str(root / places.vae_decoder), device, dtype) if places.vae_decoder else vae
    layers = kind.text_layers(recipe)
    text = TextEncoder(str(root / places.text_encoder), str(root / places.tokenizer), device, dtype, layers)
    image = None
    if "image_encoder" in kind.needs:
        image = ImageEncoder(str(root / image_encoder_place(recipe)), device, dtype)
    return vae, decoder, text, image


def _normalise(path: Path, statistics: Statistics) -> None:
    config = json.loads(path.read_bytes())
    _write_json(path, config | normalised(config, statistics))


def _class_name(folder: Path, usual: str) -> str:
    """The class that model_index.json names for a component, as the component's own files say it."""
    if not (folder / "config.json").is_file():
        return usual
    config = json.loads((folder / "config.json").read_bytes())
    return str(config.get("_class_name") or next(iter(config.get("architectures") or ()), usual))


def _scheduler_config(diffusion: DiffusionConfig, sample: SampleConfig) -> dict[str, Any]:
    """DDIM for diffusers, as the recipe samples (without clipping; leading spacing with offset 1, as published)."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": diffusion.train_steps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": diffusion.beta_schedule,
        "prediction_type": "epsilon" if diffusion.prediction == "epsilon" else "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": sample.final_level == "clean",
        "steps_offset": 1,
        "timestep_spacing": sample.spacing,
        "thresholding": False,
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr,
    }


def _motion_json(data: DataConfig, scale: str) -> dict[str, Any]:
    return {
        "scale": scale,
        "buckets": MOTION_BUCKETS,
        "metric": data.ssim,
        "bucket_edges": list(data.bucket_edges),
        "calibration": None,
    }


def _kept_calibration(root: Path, digest: str) -> Mapping[str, Any] | None:
    """None where there is none, it is of other weights, or its tables do not fit together."""
    try:
        found = json.loads((root / CALIBRATION).read_bytes())
        if "values" in found:  # older ones knew of buckets alone
            curve, count = [float(value) for value in found["curve"]], len(found["values"])
            sizes = {len(table) for table in (found["mean_motion"], *found["interval"])}
            if sizes != {count} or len(curve) != count or count < 2 or curve != sorted(curve):
                return None
        return found if found["bundle"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _kept_quality(root: Path, digest: str) -> QualityTable | None:
    """None where there is none, it is of other weights, or no such table."""
    try:
        table = QualityTable.from_json(json.loads((root / QUALITY).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return table if table.bundle == digest else None


def _localize(location: str | Path) -> Path:
    if str(location).startswith("models:/"):
        return tracking.download_bundle(str(location))
    return cache.localize(str(location))


def _read_record(root: Path, location: str | Path) -> dict[str, Any]:
    path = root / RECORD
    if not path.is_file():
        raise InputError(f"bundle {location}: no {RECORD} there; expected a folder written by pipelines/export.py")
    try:
        record = json.loads(path.read_bytes())
        check_schema(record.get("schema"), SCHEMA_VERSION, f"bundle {location}")
        files, digest = record["files"], record["digest"]
        if all(isinstance(entry["bytes"], int) and entry["sha256"] for entry in files.values()) and digest:
            return dict(record)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise InputError(f"bundle {location}: {RECORD} is damaged; export or fetch the bundle again")


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and path != root / RECORD:
            yield path.relative_to(root).as_posix(), path


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    lines = (f"{name} {entry['sha256']}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _swap(staged: Path, directory: Path) -> None:
    """Put ``staged`` in the place of ``directory``; an older bundle there is moved aside first, then removed."""
    if not directory.exists():
        os.rename(staged, directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".old", dir=staged.parent))
    os.rename(directory, old)
    try:
        os.rename(staged, directory)
    except OSError:
        os.rename(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
