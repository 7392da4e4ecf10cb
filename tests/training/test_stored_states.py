"""A training whose dataset has the text states runs no text encoder, and learns what it would have learnt."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from device import DEVICE, Waits

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data.dataset import fields, sidecars
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import LatentLoader
from cinemo.methods import build_method
from cinemo.networks.frozen import TextEncoder
from cinemo.recipes import RECIPES, override
from cinemo.training.plan.estimate import plan_training
from cinemo.training.plan.wording import plan_lines
from cinemo.training.report import sheets
from cinemo.training.run import batch as batches
from cinemo.training.run.batch import FrozenStates, KnownStates, host_batch, on_device, stored_fields
from cinemo.training.run.stored_states import with_stored_states
from cinemo.types import InputError
from tests.training.conftest import moving_samples


def _store_texts(root: Path, recipe: Recipe, shards: int = 3) -> None:
    """The field as precompute makes it."""
    index = DatasetIndex.load(str(root))
    fingerprint, covers = fields.identity("text_states", recipe)
    store = sidecars.FieldStore(str(root), "text_states", fingerprint, covers, None)
    store.begin()
    encoder = fields.Encoder(["text_states"], recipe.encoders, "float32")
    captions = {sample.key: sample.caption for sample in moving_samples(12)}
    for number, checksum in list(zip(index.shards, index.table["checksum"].to_pylist(), strict=True))[:shards]:
        keys = [*captions][4 * number : 4 * number + 4]
        states = encoder.text_states([captions[key] for key in keys])
        values = {key: state for key, state in zip(keys, states, strict=True) if state is not None}
        sidecars.commit(str(root), "text_states", number, checksum, values, {}, fingerprint)
    store.finish(range(shards))


@pytest.fixture(scope="module")
def with_texts(dataset: str, small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("with texts") / "dataset"
    shutil.copytree(dataset, root)
    _store_texts(root, small)
    return str(root)


def test_states_are_read_where_the_same_encoder_made_them(
    small: Recipe, dataset: str, with_texts: str, tmp_path: Path, encoders: dict[str, str]
) -> None:
    with_them, without = DatasetIndex.load(with_texts), DatasetIndex.load(dataset)
    decided, lines = with_stored_states(small, [with_them])
    assert lines == ["text states are read from the dataset: no text encoder is loaded"]
    assert (decided.train.text_states, stored_fields(decided)) == ("stored", ("text_states",))
    assert with_stored_states(decided, [with_them])[0] == decided
    assert with_stored_states(small, [without]) == (small, [])
    assert with_stored_states(override(small, ["train.text_states=encoded"]), [with_them])[1] == []
    mixed, (line,) = with_stored_states(small, [with_them, without])
    assert mixed == small
    assert line == f"{dataset}: has no field text_states; text states are made in training"
    with pytest.raises(InputError, match=rf"^{dataset}: has no field text_states; --set train.text_states=encoded"):
        with_stored_states(decided, [without])

    other = tmp_path / "text_encoder"
    shutil.copytree(encoders["text_encoder"], other)
    TextEncoder(str(other), encoders["tokenizer"]).network.float().save_pretrained(other)
    network = TextEncoder(str(other), encoders["tokenizer"]).network
    with torch.no_grad():
        next(network.parameters()).add_(1)
    network.save_pretrained(other)
    changed = override(small, [f"encoders.text_encoder={other}"])
    same, (line,) = with_stored_states(changed, [with_them])
    assert same == changed
    assert "field text_states was made by another encoder: text_encoder is '" in line
    assert line.endswith("; text states are made in training")

    half = tmp_path / "half"
    shutil.copytree(dataset, half)
    _store_texts(half, small, shards=2)
    assert "covers 2 of 3 shards" in with_stored_states(small, [DatasetIndex.load(str(half))])[1][0]
    info = storage.read_json(sidecars.info_uri(with_texts, "text_states"))
    lacking = tmp_path / "lacking"
    shutil.copytree(with_texts, lacking)
    storage.write_json(sidecars.info_uri(str(lacking), "text_states"), info | {"missing": {"not_finite": 1}})
    assert "lacks 1 of 13 samples" in with_stored_states(small, [DatasetIndex.load(str(lacking))])[1][0]


class Rounded:
    """The encoder of a recipe, whose states are rounded as they are stored."""

    def __init__(self, recipe: Recipe) -> None:
        self._encoder = TextEncoder(recipe.encoders.text_encoder, recipe.encoders.tokenizer)

    def encode(self, texts: list[str]) -> torch.Tensor:
        states = self._encoder.encode(texts)
        told = torch.tensor([bool(text) for text in texts])[:, None, None]
        return torch.where(told, states.half().float(), states)  # the empty prompt's are not read from anywhere


def _losses(recipe: Recipe, data: str, frozen: FrozenStates) -> list[torch.Tensor]:
    torch.manual_seed(0)
    method = build_method(recipe)
    loader = LatentLoader.of(DatasetIndex.load(data), recipe.train, fields=stored_fields(recipe))
    found = []
    for step in range(6):
        inputs = on_device(
            host_batch(loader.batch(step).samples, step, recipe), frozen, torch.device("cpu"), torch.float32
        )
        with torch.no_grad():
            found.append(method(*inputs, reduction="none"))
    return found


def test_losses_are_those_of_encoding_and_no_encoder_is_loaded(
    small: Recipe, with_texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, _ = with_stored_states(small, [DatasetIndex.load(with_texts)])
    assert small.train.prompt_dropout == 0.5
    exact = _losses(small, with_texts, FrozenStates.of(small))
    rounded = _losses(small, with_texts, FrozenStates(Rounded(small)))
    known = KnownStates.of(stored)
    monkeypatch.setattr(batches, "TextEncoder", None)
    frozen = FrozenStates.of(stored, known=known)
    read = _losses(stored, with_texts, frozen)
    assert all(torch.equal(a, b) for a, b in zip(read, rounded, strict=True)), "bit for bit, but for the rounding"
    off = max(float(((a - b).abs() / b).max()) for a, b in zip(read, exact, strict=True))
    print(f"losses off by {off:.1e} of themselves")
    assert off < 2**-11, "of float16"

    index = DatasetIndex.load(with_texts)
    samples = sheets.first_samples(index, 1, fields=stored_fields(stored))
    animated = sheets.sheet_latents(stored, build_method(stored), frozen, samples, torch.device("cpu"))
    assert torch.isfinite(animated[0]).all()
    with pytest.raises(InputError, match="text 'a dog': the dataset has no states of it, and no text encoder"):
        on_device(host_batch(moving_samples(1), 3, override(stored, ["train.prompt_dropout=0"])), frozen, "cpu", None)


def test_states_go_up_without_waiting(small: Recipe, with_texts: str) -> None:
    stored, _ = with_stored_states(small, [DatasetIndex.load(with_texts)])
    frozen = FrozenStates.of(stored, DEVICE)
    loader = LatentLoader.of(DatasetIndex.load(with_texts), stored.train, fields=stored_fields(stored))
    host = host_batch(loader.batch(0).samples, 0, stored)
    assert any(isinstance(text, torch.Tensor) for text in host.texts["text"])
    assert any(text == "" for text in host.texts["text"])
    with Waits() as waits:
        on_device(host, frozen, DEVICE, torch.float32)
    assert waits.found == []


@pytest.mark.slow
def test_the_plan_counts_no_encoder(small: Recipe) -> None:
    stored = override(small, ["train.text_states=stored", "train.posthoc_ema=[0.05,0.1]"])
    with_it, without = (plan_training(recipe, "A100-80GB", mfu=0.4) for recipe in (small, stored))
    assert without["text_encoder"] is None
    saved = with_it["memory"]["recipe"]["inputs"] - without["memory"]["recipe"]["inputs"]
    assert saved > 4 * with_it["text_encoder"]["parameters"]
    lines = plan_lines(without, None)
    assert "no frozen encoder: its states are stored" in lines[0]
    kept = without["snapshots"]
    assert kept["bytes"] == kept["count"] * 4 * without["parameters"]["trainable"]
    assert any(f"{kept['count']} snapshots, one every {kept['every']:,} steps" in line for line in lines)
    assert with_it["snapshots"] is None


def test_tokens_of_another_image_encoder_are_refused(dataset: str, tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    shutil.copytree(dataset, root)
    recipe = override(RECIPES["dynamicrafter-tiny"](), ["train.image_tokens=stored"])
    (field,) = stored_fields(recipe)
    store = sidecars.FieldStore(str(root), field, "f", {"image_encoder": "another", "version": 1}, None)
    store.begin()
    with pytest.raises(InputError, match=rf"field {field} was made by another encoder: image_encoder is 'another'"):
        with_stored_states(recipe, [DatasetIndex.load(str(root))])
    known = KnownStates.of(recipe)
    assert known.texts is None
    assert known.grey_LD is not None
    assert FrozenStates.of(recipe, known=known)._image is None
