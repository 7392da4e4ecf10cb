"""Weights as libraries save them: single files, shards with an index and variants load alike; damage is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny import random_unet, save_encoders, save_image_encoder, tiny_recipe
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from cinemo.bundle import load_bundle, save_bundle
from cinemo.networks.frozen import ImageEncoder, TextEncoder, Vae, network_digest
from cinemo.networks.lavie_unet import LavieUNet
from cinemo.networks.tokenizer import check_tokenizer
from cinemo.networks.weight_files import TRANSFORMERS, WeightFiles, check_file
from cinemo.networks.weights import load_unet, save_network
from cinemo.types import InputError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoders")
    save_encoders(directory)
    save_image_encoder(directory / "image_encoder")
    return directory


def loader(name: str, encoders: Path) -> Callable[[Path], Any]:
    """What loads the network of a folder of `encoders` from anywhere."""
    if name == "vae":
        return lambda place: Vae(str(place)).network
    if name == "image_encoder":
        return lambda place: ImageEncoder(str(place)).network
    return lambda place: TextEncoder(str(place), str(encoders / "tokenizer")).network


def library_class(name: str) -> Any:
    return {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "image_encoder": CLIPVisionModel}[name]


def assert_equal(state: State, expected: State) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["vae", "text_encoder", "image_encoder"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["16KB", "10GB"])
def test_shards_and_variants_load(name: str, variant: str | None, shard: str, encoders: Path, tmp_path: Path) -> None:
    load = loader(name, encoders)
    network = library_class(name).from_pretrained(encoders / name)
    network.save_pretrained(tmp_path / name, variant=variant, max_shard_size=shard)
    assert bool(list((tmp_path / name).glob("*.index*.json"))) == (shard == "16KB")
    assert_equal(load(tmp_path / name).state_dict(), load(encoders / name).state_dict())


def test_pickled_shards_load(encoders: Path, tmp_path: Path) -> None:
    network = AutoencoderKL.from_pretrained(encoders / "vae")
    network.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.bin"))) > 1
    assert_equal(Vae(str(tmp_path)).network.state_dict(), Vae(str(encoders / "vae")).network.state_dict())


def test_the_plain_file_comes_before_a_variant(encoders: Path, tmp_path: Path) -> None:
    shutil.copytree(encoders / "vae", tmp_path / "vae")
    digest = network_digest(str(tmp_path / "vae"))
    (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    Vae(str(tmp_path / "vae"))
    assert network_digest(str(tmp_path / "vae")) == digest


def test_the_identity_of_shards_is_all_of_them(encoders: Path, tmp_path: Path) -> None:
    network = AutoencoderKL.from_pretrained(encoders / "vae")
    network.save_pretrained(tmp_path, max_shard_size="20KB")
    digest = network_digest(str(tmp_path))
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    state = load_file(last)
    next(iter(state.values())).flatten()[0] += 1
    save_file(state, last, {"format": "pt"})
    assert network_digest(str(tmp_path)) != digest


def test_a_unet_of_shards_loads(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path).model
    unet = LavieUNet(**config.model_dump())
    save_network(unet, tmp_path / "unet")
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    path.unlink()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, held in halves.items():
        save_file({key: state[key] for key in held}, path.with_name(name))
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"weight_map": {key: name for name, held in halves.items() for key in held}}))
    assert_equal(load_unet(config, str(tmp_path)).state_dict(), unet.state_dict())
    path.with_name("b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors is missing there, a shard that .*index\.json lists"):
        load_unet(config, str(tmp_path))


def test_a_bundle_of_any_weights_loads(encoders: Path, tmp_path: Path) -> None:
    """Shards of one, the half-precision variant of the other; in the bundle each is one plain file."""
    recipe = tiny_recipe(tmp_path)
    AutoencoderKL.from_pretrained(encoders / "vae").save_pretrained(tmp_path / "vae", max_shard_size="20KB")
    text = CLIPTextModel.from_pretrained(encoders / "text_encoder")
    text.half().save_pretrained(tmp_path / "text_encoder", variant="fp16", max_shard_size="16KB")
    shutil.copytree(encoders / "tokenizer", tmp_path / "tokenizer")
    save_bundle(tmp_path / "bundle", recipe, {"unet": random_unet(recipe)}, {})
    loaded = load_bundle(tmp_path / "bundle", "cpu", full=True)
    assert_equal(loaded.vae.network.state_dict(), Vae(str(encoders / "vae")).network.state_dict())
    assert_equal(loaded.text.network.state_dict(), text.float().state_dict())
    for folder, file in (("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        names = {path.name for path in (tmp_path / "bundle" / folder).iterdir()} - {"generation_config.json"}
        assert names == {"config.json", file}


@pytest.mark.parametrize("fault", ["incomplete vae", "no merges"])
def test_what_would_not_load_makes_no_bundle(fault: str, encoders: Path, tmp_path: Path) -> None:
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(encoders / name, tmp_path / name)
    if fault == "no merges":
        (tmp_path / "tokenizer" / "merges.txt").unlink()
    else:
        path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        del state["encoder.conv_in.weight"]
        save_file(state, path, {"format": "pt"})
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(InputError, match="encoder.conv_in.weight" if fault != "no merges" else "merges.txt is missing"):
        save_bundle(tmp_path / "bundle", recipe, {"unet": random_unet(recipe)}, {})
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["vae", "text_encoder", "image_encoder"])
@pytest.mark.parametrize("fault", ["pointer", "cut", "cut header", "empty", "noise"])
def test_what_is_no_weights_is_one_line(name: str, fault: str, encoders: Path, tmp_path: Path) -> None:
    shutil.copytree(encoders / name, tmp_path / name)
    (path,) = (tmp_path / name).glob("*.safetensors")
    content = path.read_bytes()
    damaged = {
        "pointer": POINTER, "cut": content[:-1], "cut header": content[:100], "empty": b"", "noise": b"\xff" * 999
    }  # fmt: skip
    path.write_bytes(damaged[fault])
    with pytest.raises(InputError, match=f"{path.name} is {'a Git LFS pointer' if fault == 'pointer' else 'cut'}") as e:
        loader(name, encoders)(tmp_path / name)
    assert "\n" not in str(e.value)


def test_a_cut_or_foreign_pickle_is_one_line(encoders: Path, tmp_path: Path) -> None:
    shutil.copytree(encoders / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    pickled = path.with_suffix(".bin")
    torch.save(load_file(path), pickled)
    path.unlink()
    content = pickled.read_bytes()
    for damaged, reason in ((content[:-500], "cut short"), (b"hello", "cannot be read as"), (POINTER, "Git LFS")):
        pickled.write_bytes(damaged)
        with pytest.raises(InputError, match=reason) as error:
            Vae(str(tmp_path / "vae"))
        assert "\n" not in str(error.value)


def test_tokenizers_load_without_merges_only_as_one_file(encoders: Path, tmp_path: Path) -> None:
    words = str(encoders / "tokenizer")
    expected = TextEncoder(str(encoders / "text_encoder"), words).tokenizer.words("a dog").input_ids
    CLIPTokenizer.from_pretrained(words).save_pretrained(tmp_path / "one")
    place = tmp_path / "one"
    shutil.copyfile(encoders / "tokenizer" / "vocab.json", place / "vocab.json")
    for unneeded in ("merges.txt", "vocab.json", "tokenizer_config.json"):
        (place / unneeded).unlink(missing_ok=True)
        assert TextEncoder(str(encoders / "text_encoder"), str(place)).tokenizer.words("a dog").input_ids == expected
    (place / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"tokenizer\.json is a Git LFS pointer"):
        check_tokenizer(str(place))
    (place / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as CLIPTokenizer"):
        TextEncoder(str(encoders / "text_encoder"), str(place))


def test_a_file_with_more_than_its_header_says_is_damaged(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    check_file(tmp_path / "a.safetensors", "here")
    with (tmp_path / "a.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match=r"here: a\.safetensors is cut short or damaged"):
        check_file(tmp_path / "a.safetensors", "here")


@pytest.mark.parametrize("header", ["[" * 100_000, '{"a": {"data_offsets": [0, Infinity]}}'], ids=["deep", "infinite"])
def test_a_header_that_says_nothing_is_damaged(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(InputError, match=r"here: a\.safetensors is cut short or damaged"):
        check_file(tmp_path / "a.safetensors", "here")


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        ("[" * 100_000, "is no index of shards"),
        ('{"weight_map": {"a": "%s"}}' % ("x" * 300), "x{100} is missing there"),
    ],
    ids=["deep", "long"],
)
def test_an_index_that_names_no_file_is_one_line(tmp_path: Path, index: str, fault: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=fault):
        WeightFiles.find(tmp_path, "here", *TRANSFORMERS)
