"""Pictures and prompts of one's own (``train.py --validation``), which sample sheets animate beside the dataset's.

They come from a table (.jsonl, .csv, .parquet) with the columns ``image`` and ``prompt`` and, where wanted, the
method's further inputs and controls by their names; or from a folder of pictures with prompts beside them (a.png,
a.txt). A run keeps a copy, from which it goes on::

    <output>/validation/prompts.jsonl   the rows, each with the seed that it keeps
                        00-image.png    the files that they name, as they were given
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet

from cinemo import storage
from cinemo.animate import AnimateRequest, load_image, load_source
from cinemo.config import Recipe
from cinemo.methods import controls_of, method_class
from cinemo.types import InputError, keyed_seed

MOST = 64  # rows; a sheet of more would stop a training for long
STEPS = 20  # of a row that does not say; as the sheet of the dataset's samples
_DIRECTORY, _TABLE = "validation", "prompts.jsonl"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Prompt:
    """One row. ``name``: how messages call it. ``files``: URIs by input, ``image`` first. ``controls``: as given, and
    the seed.
    """

    name: str
    text: str
    files: Mapping[str, str]
    controls: Mapping[str, Any] = field(default_factory=dict)

    def request(self, recipe: Recipe) -> AnimateRequest:
        """What is asked of the recipe's method; reads the files.

        Raises:
            InputError: a file cannot be read, or something is no input or control of it.
        """
        about, inputs = method_class(recipe).inputs, {}
        for name, uri in self.files.items():
            if name != "image":
                inputs[name] = load_source(uri, recipe) if about[name].kind == "video" else load_image(uri)
        controls = {"steps": STEPS, **self.controls}
        return AnimateRequest(load_image(self.files["image"]), self.text, inputs=inputs, **controls)


def read(place: str, recipe: Recipe) -> list[Prompt]:
    """The rows of a table, or of a folder.

    Raises:
        InputError: there is none, a row has no picture or prompt, or there are more than `MOST`.
    """
    place = storage.absolute(place)
    try:
        rows = list(_rows(place, recipe))
    except FileNotFoundError:
        raise InputError(f"validation {place}: is not there; expected a table or a folder of pictures") from None
    except (UnicodeDecodeError, ValueError, pyarrow.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"validation {place}: cannot be read ({str(error).splitlines()[0]})") from None
    if not 0 < len(rows) <= MOST:
        raise InputError(f"validation {place}: has {len(rows)} rows, expected 1..{MOST}")
    seen: dict[tuple[str, str], int] = {}
    inputs, prompts = ("image", *method_class(recipe).inputs), []
    for name, row in rows:
        given = {key: value for key, value in row.items() if value is not None and value != ""}
        image, text = given.pop("image", None), given.pop("prompt", None)
        if not isinstance(image, str) or not isinstance(text, str):
            raise InputError(f"validation {name}: has no {'prompt' if isinstance(image, str) else 'image'}")
        files = {"image": image, **{key: str(given.pop(key)) for key in inputs if key in given}}
        # One of the row alone, so that sheets compare also when others come and go; equal rows differ by their number.
        turn = seen[image, text] = seen.get((image, text), -1) + 1
        given.setdefault("seed", keyed_seed(recipe.train.seed, "validation", image, text, turn))
        folder = place if place.endswith("/") else place.rpartition("/")[0]
        prompts.append(Prompt(name, text, {key: _beside(folder, file) for key, file in files.items()}, given))
    return prompts


def faults(prompts: Sequence[Prompt], recipe: Recipe) -> list[str]:
    """What is wrong, in a line for each row that cannot be animated."""
    found = []
    for prompt in prompts:
        try:
            prompt.request(recipe).settings(recipe)
        except InputError as error:
            found.append(f"validation {prompt.name}: {error}")
    return found


def keep(prompts: Sequence[Prompt], output: str) -> None:
    """Make them the run's own, in the place of others that it had."""
    root, rows = storage.join(output, _DIRECTORY), []
    contents = [{name: storage.read_bytes(uri) for name, uri in prompt.files.items()} for prompt in prompts]
    storage.remove(root)
    for number, (prompt, files) in enumerate(zip(prompts, contents, strict=True)):
        names = {key: f"{number:02d}-{key}{PurePosixPath(prompt.files[key]).suffix}" for key in files}
        for key, content in files.items():
            storage.write_bytes(storage.join(root, names[key]), content)
        rows.append(json.dumps({**names, "prompt": prompt.text, **prompt.controls}))
    storage.write_bytes(storage.join(root, _TABLE), ("\n".join(rows) + "\n").encode())


def kept(output: str, recipe: Recipe) -> list[Prompt]:
    """Those of a run; none where it has none."""
    place = storage.join(output, _DIRECTORY, _TABLE)
    return read(place, recipe) if storage.exists(place) else []


def drop(output: str) -> None:
    """From now on the run has none."""
    storage.remove(storage.join(output, _DIRECTORY))


def _rows(place: str, recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    suffix = PurePosixPath(place).suffix.lower()
    if suffix == ".jsonl":
        for number, line in enumerate(storage.read_bytes(place).decode().splitlines(), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f"validation {place}:{number}: is no object, expected one a line")
                yield f"{place}:{number}", row
    elif suffix == ".csv":
        table = csv.DictReader(io.StringIO(storage.read_bytes(place).decode("utf-8-sig"), newline=""))
        for number, cells in enumerate(table, 2):
            yield f"{place}:{number}", {str(key): _typed(str(key), cell, recipe) for key, cell in cells.items()}
    elif suffix == ".parquet":
        content = pyarrow.parquet.read_table(io.BytesIO(storage.read_bytes(place)))
        for number, row in enumerate(content.to_pylist(), 1):
            yield f"{place} row {number}", row
    elif names := storage.names(place):
        for name in names:
            stem, _, ending = name.rpartition(".")
            if f".{ending.lower()}" in _PICTURES:
                if f"{stem}.txt" not in names:
                    raise InputError(f"validation {place}: {name} has no prompt beside it; expected {stem}.txt")
                text = storage.read_bytes(storage.join(place, f"{stem}.txt")).decode().strip()
                yield storage.join(place, name), {"image": storage.join(place, name), "prompt": text}
    elif storage.exists(place):
        raise InputError(f"validation {place}: expected .jsonl, .csv, .parquet, or a folder of pictures")
    else:
        raise FileNotFoundError(place)


def _typed(name: str, cell: Any, recipe: Recipe) -> Any:
    """A cell of a CSV file as the control of its column takes it."""
    info = controls_of(method_class(recipe).controls_type).get(name)
    if info is None or info.kind in ("text", "choice") or not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _beside(folder: str, file: str) -> str:
    is_whole = storage.is_remote(file) or "://" in file or PurePosixPath(file).is_absolute()
    return file if is_whole else storage.join(folder, file)
