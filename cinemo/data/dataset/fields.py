"""What may be stored beside the latents, what each field depends on, and the steps that make it (Ray-free).

``text_states``: last hidden states (L, D) of the text encoder for the caption, float16, padded to its full length.
``first_frame``: the first frame as JPEG. ``frames``: all of them, in one tall picture (`media.stills`).
``image_tokens``: last hidden states (L, D) of CLIP's image encoder for the first frame, float16; ``frame_tokens``
(F, L, D) for every frame.
``flow``: optical flow between stored frames at the latents' resolution, float16 (F-1, 2, h, w): `media.flow`, or
`networks.raft` where the recipe names its weights.

A row is one shard: so a shard's bytes depend on nothing beside it. Frames are decoded again where a field needs them,
the very ones that ``KEY.json`` names.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from cinemo import checksums, storage
from cinemo.config import DataConfig, EncodersConfig, Recipe
from cinemo.data.dataset import shards, sidecars
from cinemo.data.dataset.identity import RESIZE, digest, encoder_dtype
from cinemo.data.dataset.shards import Members
from cinemo.data.precompute.stages import use_one_thread
from cinemo.media import flow, stills
from cinemo.media.sources import Sources, fetched
from cinemo.media.video import read_frames
from cinemo.methods import method_class
from cinemo.networks import raft
from cinemo.networks.frozen import ImageEncoder, TextEncoder, check_image_encoder, network_digest
from cinemo.networks.raft import Raft, check_raft
from cinemo.networks.weights import weights_digest
from cinemo.types import ClipError, InputError

# Raise a field's number when the same recipe no longer gives the same bytes of it.
VERSIONS = {"text_states": 1, "first_frame": 1, "image_tokens": 1, "flow": 1, "frames": 1, "frame_tokens": 1}
_DECODED = frozenset({"first_frame", "image_tokens", "flow", "frames", "frame_tokens"})
_EVERY_FRAME = frozenset({"flow", "frames", "frame_tokens"})
# Encoders always see so many inputs at once, the last ones repeated to fill up: kernels of one shape for all of them.
_TEXTS, _IMAGES = 16, 8

_PAYLOADS = [(field, pa.list_(pa.large_binary())) for field in VERSIONS]
TODO = pa.schema([("shard", pa.int32()), ("fields", pa.list_(pa.string()))])
MADE = pa.schema(
    [
        *TODO,
        ("shard_checksum", pa.string()),
        ("keys", pa.list_(pa.string())),
        ("captions", pa.list_(pa.string())),
        ("faults", pa.list_(pa.string())),
        ("size", pa.list_(pa.int32())),  # height, width of its pictures
        ("pixels", pa.list_(pa.large_binary())),
        *_PAYLOADS,
        ("decode_seconds", pa.float64()),
        ("encode_seconds", pa.float64()),
    ]
)
COMMITTED = pa.schema(
    [
        ("shard", pa.int32()),
        ("samples", pa.int32()),
        ("missing", pa.string()),
        ("decode_seconds", pa.float64()),
        ("encode_seconds", pa.float64()),
    ]
)
T = TypeVar("T")


def encoded(encoders: EncodersConfig) -> frozenset[str]:
    """The fields that a network makes."""
    return frozenset({"text_states", "image_tokens", "frame_tokens"} | ({"flow"} if encoders.flow else set()))


def identity(field: str, recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """A digest of what decides a field's bytes for given shards, and what it covers.

    Raises:
        InputError: an encoder is missing.
    """
    data, encoders = recipe.data, recipe.encoders
    covers: dict[str, Any] = {"version": VERSIONS[field]}
    if field in _DECODED:
        covers |= {"size": list(data.size), "decoder": data.decoder, "resize": RESIZE}
        if data.other_shapes:
            covers |= {"other_shapes": [list(shape) for shape in data.other_shapes]}
    if field in encoded(encoders):
        covers |= {"dtype": encoder_dtype(recipe)}
    match field:
        case "text_states":
            covers |= {
                "text_encoder": network_digest(encoders.text_encoder),
                "tokenizer": weights_digest(encoders.tokenizer),
            }
            if (layers := method_class(recipe).text_layers(recipe)) is not None:
                covers |= {"layers": layers}
        case "first_frame":
            covers |= {"jpeg": stills.JPEG}
        case "frames":
            covers |= {"jpeg": stills.JPEG, "frames": data.frames}
        case "image_tokens" | "frame_tokens":
            if encoders.image_encoder is None:
                raise InputError(
                    f"data.fields has {field}, but encoders.image_encoder is not set: expected the directory of a "
                    "CLIPVisionModel"
                )
            check_image_encoder(encoders.image_encoder)
            covers |= {
                "image_encoder": network_digest(encoders.image_encoder),
                "preprocessing": ImageEncoder.PREPROCESSING,
            }
            if field == "frame_tokens":
                covers |= {"frames": data.frames}
        case "flow":
            covers |= {"frames": data.frames, "method": raft.METHOD if encoders.flow else flow.METHOD}
            if encoders.flow:
                for _, *size in data.shapes:
                    check_raft(encoders.flow, (size[0], size[1]))
                covers |= {"weights": weights_digest(encoders.flow)}
    return digest(covers), covers


def read(todo: pa.Table, dataset: str, recipe: Recipe) -> pa.Table:
    """Shards -> their keys and captions, and the fields that need no network."""
    use_one_thread()
    rows, made_later = [], encoded(recipe.encoders)
    for row in todo.to_pylist():
        started = time.perf_counter()
        record = storage.read_json(shards.record_uri(dataset, row["shard"]))
        members = Members(**record["members"])
        samples = shards.read_metadata(dataset, row["shard"], members)
        row |= {
            "shard_checksum": checksums.recorded(record),
            "keys": members.keys,
            "captions": [sample["caption"] for sample in samples],
        }
        if _DECODED & set(row["fields"]):
            data, cells = recipe.data, (0, 0)
            if samples:  # else every clip was refused, and the shard has no latents
                cells = members.array_shape[2], members.array_shape[3]
                data = data.of_shape(shards.pixels(members.array_shape)) if data.other_shapes else data
            row |= {"size": data.size, **_pictures(samples, row["fields"], data, cells, made_later)}
        rows.append({**row, "decode_seconds": time.perf_counter() - started, "encode_seconds": 0.0})
    return pa.Table.from_pylist(rows, MADE)


def decode_again(
    views: Sequence[Mapping[str, Any]], data: DataConfig, frames: int, sources: Sources | None = None
) -> list[np.ndarray]:
    """The first ``frames`` frames (uint8 ``FHWC``) of stored views of one clip, by what their metadata say.

    Raises:
        ClipError: the source is gone, or cannot be read any more.
    """
    uri = views[0]["uri"]
    indices = [view["start_frame"] + k * view["frame_interval"] for view in views for k in range(frames)]
    with sources.file(uri) if sources else fetched(uri) as path:
        frames_NHWC = read_frames(path, indices, data.size, data.decoder)
    return list(frames_NHWC.reshape(len(views), frames, *frames_NHWC.shape[1:]))


class Encoder:
    """Adds the fields that a network makes. Build one in each process that encodes."""

    def __init__(
        self,
        fields: Sequence[str],
        encoders: EncodersConfig,
        dtype: str,
        text_layers: int | None = None,
    ) -> None:
        use_one_thread()
        device, precision = "cuda" if dtype == "float16" else "cpu", getattr(torch, dtype)
        if "text_states" in fields:
            self.text = TextEncoder(encoders.text_encoder, encoders.tokenizer, device, precision, text_layers)
        if not {"image_tokens", "frame_tokens"}.isdisjoint(fields) and encoders.image_encoder is not None:
            self.image = ImageEncoder(encoders.image_encoder, device, precision)
        self.raft = Raft(encoders.flow, device) if "flow" in fields and encoders.flow else None

    def __call__(self, made: pa.Table) -> pa.Table:
        rows = []
        for row in made.to_pylist():
            started = time.perf_counter()
            if "text_states" in row["fields"]:
                row["text_states"] = self.text_states(row["captions"])
            if "image_tokens" in row["fields"]:
                row["image_tokens"] = self.image_tokens(row["pixels"], row["size"])
            if "frame_tokens" in row["fields"]:
                row["frame_tokens"] = self.frame_tokens(row["pixels"], row["size"])
            if "flow" in row["fields"] and self.raft is not None:
                row["flow"] = self.flow(row["pixels"], row["size"])
            row["pixels"] = None
            rows.append({**row, "encode_seconds": time.perf_counter() - started})
        return pa.Table.from_pylist(rows, MADE)

    def text_states(self, captions: Sequence[str]) -> list[bytes | None]:
        """A .npy file for each caption; equal captions (views of one clip) are encoded once."""
        unique = list(dict.fromkeys(captions))
        states = dict(zip(unique, map(_file, _in_batches(unique, _TEXTS, self.text.encode)), strict=True))
        return [states[caption] for caption in captions]

    def image_tokens(self, pixels: Sequence[bytes | None], size: Sequence[int]) -> list[bytes | None]:
        """A .npy file for each first frame that there is."""
        present = [_frames(content, size)[0] for content in pixels if content is not None]
        tokens = iter(_in_batches(present, _IMAGES, self.image.encode))
        return [None if content is None else _file(next(tokens)) for content in pixels]

    def frame_tokens(self, pixels: Sequence[bytes | None], size: Sequence[int]) -> list[bytes | None]:
        """A .npy file for the frames of each sample that there is."""
        return [
            None
            if content is None
            else _file(np.stack([*_in_batches(list(_frames(content, size)), _IMAGES, self.image.encode)]))
            for content in pixels
        ]

    def flow(self, pixels: Sequence[bytes | None], size: Sequence[int]) -> list[bytes | None]:
        """A .npy file for the frames of each sample that there is."""
        assert self.raft is not None
        cells = size[0] // 8, size[1] // 8
        frames = (None if content is None else _frames(content, size) for content in pixels)
        return [None if each is None else _file(self.raft.dense_flow(each, cells)) for each in frames]


def _frames(content: bytes, size: Sequence[int]) -> np.ndarray:
    return np.frombuffer(content, np.uint8).reshape(-1, *size, 3)


def commit(made: pa.Table, dataset: str, fingerprints: Mapping[str, str]) -> pa.Table:
    """Write the sidecars of a shard; one row of totals."""
    rows = []
    for row in made.to_pylist():
        missing: Counter[str] = Counter()
        for field in row["fields"]:
            values, absent = {}, Counter[str]()
            for place, (key, content) in enumerate(zip(row["keys"], row[field] or [], strict=True)):
                if content is None:
                    absent[(row["faults"] and row["faults"][place]) or "not_finite"] += 1
                else:
                    values[key] = content
            sidecars.commit(dataset, field, row["shard"], row["shard_checksum"], values, absent, fingerprints[field])
            missing += absent
        rows.append(
            {
                "shard": row["shard"],
                "samples": len(row["keys"]),
                "missing": json.dumps(missing),
                "decode_seconds": row["decode_seconds"],
                "encode_seconds": row["encode_seconds"],
            }
        )
    return pa.Table.from_pylist(rows, COMMITTED)


def _pictures(
    samples: Sequence[Mapping[str, Any]],
    fields: Sequence[str],
    data: DataConfig,
    cells: tuple[int, int],
    made_later: Collection[str],
) -> dict[str, list[Any]]:
    """Columns of a shard that follow from its frames; views of a clip are decoded in one pass.

    ``made_later``: fields for which frames are only handed on.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("faults", "pixels", "first_frame", "frames", "flow")}
    frames = 1 if _EVERY_FRAME.isdisjoint(fields) else data.frames
    later = {*fields} & {*made_later}
    shown = data.frames if later & _EVERY_FRAME else "image_tokens" in later  # how many an encoder will see
    with Sources() as sources:
        for _, group in itertools.groupby(samples, key=lambda sample: sample["clip_id"]):
            views = list(group)
            try:
                decoded: list[np.ndarray | None] = [*decode_again(views, data, frames, sources)]
                fault = None
            except ClipError as error:
                decoded, fault = [None] * len(views), error.reason
            for frames_FHWC in decoded:
                made = dict.fromkeys(columns, None) | {"faults": fault}
                if frames_FHWC is not None:
                    made["pixels"] = frames_FHWC[:shown].tobytes() if shown else None
                    made["first_frame"] = stills.jpeg(frames_FHWC[0]) if "first_frame" in fields else None
                    made["frames"] = stills.jpeg_strip(frames_FHWC) if "frames" in fields else None
                    if "flow" in fields and "flow" not in later:
                        made["flow"] = sidecars.array_bytes(flow.dense_flow(frames_FHWC, cells))
                for name, value in made.items():
                    columns[name].append(value)
    return columns


def _in_batches(inputs: Sequence[T], size: int, encode: Callable[[Sequence[T]], torch.Tensor]) -> Iterator[np.ndarray]:
    """The float16 states (L, D) of each input."""
    for start in range(0, len(inputs), size):
        batch = list(inputs[start : start + size])
        states_BLD = encode(batch + [batch[-1]] * (size - len(batch))).to(torch.float16).cpu().numpy()
        yield from states_BLD[: len(batch)]


def _file(states: np.ndarray) -> bytes | None:
    """Its .npy file; None where a state exceeds float16."""
    return sidecars.array_bytes(states) if np.isfinite(states).all() else None
