"""Which text is a clip's caption: one of several, drawn by a key, or what stands in a file beside the video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cinemo.data.manifest.checks import is_list, simple
from cinemo.types import keyed_seed

# What a caption is called in files beside videos: video2dataset, Hugging Face's folders, trainers of video models.
CAPTION_KEYS = ("caption", "captions", "text", "prompt")


def drawn(captions: Any, clip_id: Any, seed: int) -> str | None:
    """One of some captions, the same for a clip id and seed wherever it is asked; None where none is a text."""
    texts = [text for text in captions if isinstance(text, str) and text.strip()]
    return texts[_choice(clip_id, seed, len(texts))] if texts else None


def is_texts(kind: pa.DataType) -> bool:
    """Whether a column of this type holds several captions a row."""
    if not is_list(kind):
        return False
    inner = kind.value_type.value_type if pa.types.is_dictionary(kind.value_type) else kind.value_type
    return inner in (pa.string(), pa.large_string(), pa.string_view())


def drawn_column(captions: pa.Array, clip_ids: pa.Array, seed: int) -> pa.Array:
    """`drawn` for a column of lists of strings."""
    parents, texts = pc.list_parent_indices(captions), simple(pc.list_flatten(captions)).cast(pa.string())
    there = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(texts), ""), False)
    texts = texts.filter(there)
    counts = np.bincount(parents.filter(there).to_numpy(), minlength=len(captions))
    places = np.cumsum(counts) - counts
    several = np.flatnonzero(counts > 1)
    for row, clip_id in zip(several.tolist(), clip_ids.take(pa.array(several)).to_pylist(), strict=True):
        places[row] += _choice(clip_id, seed, int(counts[row]))
    return texts.take(pa.array(places, mask=counts == 0))


def _choice(clip_id: Any, seed: int, count: int) -> int:
    return 0 if count == 1 else keyed_seed(seed, "caption", str(clip_id)) % count


def caption_of(values: Mapping[str, Any], clip_id: str, seed: int) -> tuple[str | None, dict[str, Any]]:
    """The caption among a file's values (None where there is none), and the other values."""
    for key in CAPTION_KEYS:
        value = values.get(key)
        caption = drawn(value, clip_id, seed) if isinstance(value, list) else value
        if isinstance(caption, str):
            return caption, {name: other for name, other in values.items() if name != key}
    return None, dict(values)
