"""Bundles: what is written is what is loaded, damage is named, and a reader never sees half of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file
from tiny import random_unet, tiny_bundle, tiny_recipe
from transformers import CLIPTextModel, CLIPTokenizer

from cinemo import storage, tracking
from cinemo.bundle import RECORD, load_bundle, read_card, save_bundle
from cinemo.types import Condition, InputError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "bundle"))


def test_round_trip(written: Path) -> None:
    loaded = load_bundle(written, "cpu", full=True)
    recipe = tiny_recipe(written.parent / "encoders")
    wanted = random_unet(recipe).state_dict()
    state = loaded.method.unet.state_dict()
    assert set(state) == set(wanted)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert loaded.recipe.sample == recipe.sample
    assert loaded.motion.edges == recipe.data.bucket_edges
    assert loaded.digest == json.loads((written / RECORD).read_text())["digest"]
    assert not loaded.method.training
    assert not any(parameter.requires_grad for parameter in loaded.method.parameters())


def test_a_bundle_needs_nothing_outside_itself(written: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(written, tmp_path / "elsewhere"))
    encoders = read_card(moved).recipe.encoders
    assert (encoders.vae, encoders.text_encoder, encoders.tokenizer) == ("vae", "text_encoder", "tokenizer")
    hidden = written.parent / "encoders"
    hidden.rename(tmp_path / "hidden")
    try:
        assert load_bundle(moved, "cpu").text.encode(["a"]).shape == (1, 77, 32)
    finally:
        (tmp_path / "hidden").rename(hidden)


def test_a_bundle_comes_from_the_model_registry(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CINEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tracking.Run(str(tmp_path), "train")
    run.finish()
    tracking.register_bundle(written, run.run_id, run.uri, "walker")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)
    loaded = load_bundle("models:/walker/latest", "cpu", full=True)
    assert (loaded.digest, loaded.location) == (read_card(written).digest, "models:/walker/latest")


def test_the_scheduler_is_what_diffusers_would_load(written: Path) -> None:
    scheduler = DDIMScheduler.from_pretrained(written, subfolder="scheduler")
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[:2].tolist() == [981, 961]
    assert float(scheduler.alphas_cumprod[975]) == pytest.approx(6.517e-5, rel=1e-3)
    assert float(scheduler.final_alpha_cumprod) == pytest.approx(0.9999)


def test_every_component_is_what_diffusers_and_transformers_load(written: Path) -> None:
    loaded = load_bundle(written, "cpu")
    vae = AutoencoderKL.from_pretrained(written, subfolder="vae").eval()
    text = CLIPTextModel.from_pretrained(written / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(written / "tokenizer")
    latents_FCHW = torch.randn(2, vae.config.latent_channels, 4, 4)
    with torch.no_grad():
        frames = vae.decode(latents_FCHW / vae.config.scaling_factor).sample
        ours = torch.from_numpy(loaded.decoder.decode(latents_FCHW)).permute(0, 3, 1, 2)
        assert float((ours - (frames / 2 + 0.5).clamp(0, 1) * 255).abs().max()) <= 0.5001
        ids = tokenizer(["a cat"], padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        torch.testing.assert_close(text(ids).last_hidden_state, loaded.text.encode(["a cat"]), rtol=0, atol=1e-5)
    weights = load_file(written / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == random_unet(loaded.recipe).state_dict().keys()


def test_networks_stored_in_float16_are_not_served_in_less(tmp_path: Path) -> None:
    """Off the CPU; bfloat16 has an eighth of its precision, and early steps divide the error by 0.0076."""
    place = tiny_bundle(tmp_path)
    assert load_bundle(place, "meta").method.networks["unet"].dtype == torch.bfloat16
    recipe = tiny_recipe(tmp_path / "encoders")
    save_bundle(tmp_path / "half", recipe, {"unet": random_unet(recipe).half()}, {"made": "by a test"})
    assert load_bundle(tmp_path / "half", "meta").method.networks["unet"].dtype == torch.float16
    assert load_bundle(tmp_path / "half", "meta", torch.bfloat16).method.networks["unet"].dtype == torch.bfloat16
    assert load_bundle(tmp_path / "half", "cpu").method.networks["unet"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU: install g++")
@pytest.mark.parametrize("how", [pytest.param(True, marks=pytest.mark.release), "regional"])
def test_a_compiled_network_gives_the_same(tmp_path: Path, how: bool | str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = load_bundle(tiny_bundle(tmp_path / "plain"), "cpu")
    compiled = load_bundle(tiny_bundle(tmp_path / "compiled", compiled=how), "cpu")
    condition = Condition(
        image=torch.randn(1, 4, 4, 6), text=plain.text.encode(["a red ball"]), motion_bucket=torch.tensor([7.0])
    )
    noise_BCFHW = torch.randn(1, 4, 3, 4, 6)
    graphs = []
    with torch.inference_mode():
        for step in (900, 40):
            expected, got = (
                bundle.method.predict(noise_BCFHW, step, bundle.method.ready(condition)) for bundle in (plain, compiled)
            )
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1], "not one for each step"
    network = compiled.method.networks["unet"]
    blocks = sum(isinstance(module, network.regions) for module in network.modules())
    assert graphs[0] == 1 if how is True else 1 < graphs[0] < blocks, "those of one kind share theirs"


def test_the_digest_is_of_the_content_alone(written: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(written.parent / "encoders")
    digest = save_bundle(tmp_path / "again", recipe, {"unet": random_unet(recipe)}, {"made": "at another time"})
    assert digest == read_card(written).digest
    unet = random_unet(recipe)
    with torch.no_grad():
        unet.conv_in.bias[0] += 1
    assert save_bundle(tmp_path / "other", recipe, {"unet": unet}, {}) != digest


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "motion.json"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        load_bundle(bundle)


def test_a_truncated_file_is_named(bundle: Path) -> None:
    path = bundle / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"unet/diffusion_pytorch_model.safetensors is damaged"):
        load_bundle(bundle)


def test_a_changed_byte_is_found_at_once_in_json_and_by_a_full_check_in_weights(bundle: Path) -> None:
    path = bundle / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    read_card(bundle)
    with pytest.raises(InputError, match=r"vae/diffusion_pytorch_model.safetensors is damaged \(sha256"):
        read_card(bundle, full=True)
    recipe = bundle / "recipe.json"
    recipe.write_text(recipe.read_text().replace("random-32x48", "random-32x49"))
    with pytest.raises(InputError, match=r"recipe.json is damaged"):
        read_card(bundle)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"x": 3}, "digest": "d"}'])
def test_a_damaged_record_is_named(bundle: Path, content: str) -> None:
    (bundle / RECORD).write_text(content)
    with pytest.raises(InputError, match=r"bundle.json is damaged"):
        read_card(bundle)


def test_a_directory_without_record_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a folder written by"):
        read_card(tmp_path)


def test_only_bundles_and_empty_directories_are_replaced(written: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(written.parent / "encoders")
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "holiday.png").write_bytes(b"x")
    with pytest.raises(InputError, match="not a bundle"):
        save_bundle(precious, recipe, {"unet": random_unet(recipe)}, {})
    assert [path.name for path in precious.iterdir()] == ["holiday.png"]

    target = tmp_path / "target"
    target.mkdir()
    save_bundle(target, recipe, {"unet": random_unet(recipe)}, {"number": 1})
    save_bundle(target, recipe, {"unet": random_unet(recipe)}, {"number": 2})
    assert read_card(target, full=True).provenance == {"number": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "target"], "nothing staged is left"


def test_a_failed_save_leaves_the_old_bundle(bundle: Path, written: Path) -> None:
    recipe = tiny_recipe(written.parent / "encoders")
    broken = recipe.model_copy(update={"encoders": recipe.encoders.model_copy(update={"vae": str(bundle / "none")})})
    with pytest.raises(InputError, match="none"):
        save_bundle(bundle, broken, {"unet": random_unet(recipe)}, {})
    read_card(bundle, full=True)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_pickled_weights_are_not_taken_into_a_bundle(written: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(Path(shutil.copytree(written.parent / "encoders", tmp_path / "encoders")))
    vae = tmp_path / "encoders" / "vae"
    (vae / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    save_bundle(tmp_path / "good", recipe, {"unet": random_unet(recipe)}, {})
    assert not list((tmp_path / "good").rglob("*.bin"))
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"encoder .*vae: not a readable weights file"):
        save_bundle(tmp_path / "bad", recipe, {"unet": random_unet(recipe)}, {})
    assert not (tmp_path / "bad").exists()


def test_pickled_weights_are_kept_as_safetensors(written: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(Path(shutil.copytree(written.parent / "encoders", tmp_path / "encoders")))
    wanted = load_bundle(written, "cpu")
    for folder, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = tmp_path / "encoders" / folder / f"{name}.safetensors"
        pickled = "pytorch_model.bin" if name == "model" else f"{name}.bin"
        torch.save(load_file(path), path.with_name(pickled))
        path.unlink()
    save_bundle(tmp_path / "bundle", recipe, {"unet": random_unet(recipe)}, {})
    loaded = load_bundle(tmp_path / "bundle", "cpu", full=True)
    for got, expected in ((loaded.vae.network, wanted.vae.network), (loaded.text.network, wanted.text.network)):
        state = got.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


@pytest.mark.s3
def test_a_bundle_on_s3(written: Path, s3_endpoint: str) -> None:
    storage.upload(written, "s3://cinemo-test/bundles/one")
    assert load_bundle("s3://cinemo-test/bundles/one", full=True).digest == read_card(written).digest


def test_a_bundle_of_a_later_format_is_named(bundle: Path) -> None:
    record = json.loads((bundle / RECORD).read_text())
    assert record["schema"] == 1
    (bundle / RECORD).write_text(json.dumps(record | {"schema": 2}))
    with pytest.raises(
        InputError, match=r"bundle .*: has format 2, this version of cinemo reads up to 1; update cinemo"
    ):
        load_bundle(bundle)
