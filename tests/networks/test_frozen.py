from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import golden_files
from tiny import WIDTH, save_encoders, save_image_encoder

from cinemo.networks.frozen import ImageEncoder, TextEncoder, Vae, network_digest, normalised, vae_scaling
from cinemo.networks.tokenizer import Tokenizer
from cinemo.training.plan.activations import PeakMemory
from cinemo.types import InputError


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKLTemporalDecoder

    directory = tmp_path_factory.mktemp("encoders")
    save_encoders(directory)
    torch.manual_seed(1)
    temporal = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32, 32, 32, 32), layers_per_block=1
    )
    temporal.save_pretrained(directory / "temporal")
    return directory


@pytest.fixture(scope="module")
def vae(encoders: Path) -> Vae:
    return Vae(str(encoders / "vae"))


def frames(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_encoding_is_scaled_and_frame_by_frame(vae: Vae) -> None:
    pixels = frames(3)
    latents = vae.encode(pixels)
    assert latents.shape == (3, vae.latent_channels, 2, 3)
    expected = vae.network.encode(pixels).latent_dist.mode() * vae.network.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(vae.encode(pixels[1:2]), latents[1:2])
    assert not latents.is_inference()  # they may be used in training


def test_statistics_of_channels_normalise_each_of_them(encoders: Path, vae: Vae, tmp_path: Path) -> None:
    """As newer diffusers autoencoders carry them: (z - mean) / std * scaling_factor, and back."""
    copy = Path(shutil.copytree(encoders / "vae", tmp_path / "vae"))
    config = json.loads((copy / "config.json").read_text())
    mean, deviation = [0.5, -1.0, 0.0, 2.0], [1.0, 0.25, 3.0, 0.5]
    statistics = {"latents_mean": mean, "latents_std": deviation, "scaling_factor": 0.5}
    (copy / "config.json").write_text(json.dumps(config | statistics))
    normal, pixels = Vae(str(copy)), frames(3)
    latents = normal.encode(pixels)
    plain = vae.network.encode(pixels).latent_dist.mode()
    expected = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None] * 0.5
    torch.testing.assert_close(latents, expected)
    np.testing.assert_array_equal(normal.decode(latents), vae.decode(plain * vae.network.config.scaling_factor))
    assert network_digest(str(copy)) != network_digest(str(encoders / "vae"))


def test_measured_statistics_normalise_latents_as_they_are_scaled_now(encoders: Path, vae: Vae, tmp_path: Path) -> None:
    """Given to the class or written into the configuration: (l - mean) / std of its scaled latents l, and back."""
    copy = Path(shutil.copytree(encoders / "vae", tmp_path / "vae"))
    config, pixels = json.loads((copy / "config.json").read_text()), frames(3)
    config |= {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 0.25, 3.0, 0.5], "shift_factor": 0.1}
    for known in (config, {key: config[key] for key in config if not key.startswith("latents_")}):
        (copy / "config.json").write_text(json.dumps(known))
        before = Vae(str(copy))
        latents = before.encode(pixels)
        statistics = latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()
        given = Vae(str(copy), statistics=statistics)
        (copy / "config.json").write_text(json.dumps(known | normalised(known, statistics)))
        for one in (given, Vae(str(copy))):
            normal = one.encode(pixels)
            torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
            torch.testing.assert_close(normal.std((0, 2, 3)), torch.ones(4))
            np.testing.assert_array_equal(one.decode(normal), before.decode(latents))
    with pytest.raises(InputError, match="latents_mean has 3 numbers, but the autoencoder has 4 latent channels"):
        normalised(config, ([0.0] * 3, [1.0] * 3))


def test_sampling_depends_on_the_generator_alone(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cinemo.networks.frozen._CHUNK_PIXELS", 7 * 16 * 24)
    pixels = frames(20)  # more than one chunk
    first, again, other = (vae.encode(pixels, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    posterior = vae.network.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    expected = (posterior.mean + posterior.std * noise) * vae.network.config.scaling_factor
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)


def test_plain_decoding_rounds_to_nearest(vae: Vae) -> None:
    latents = torch.randn(10, vae.latent_channels, 2, 3)
    video = vae.decode(latents)
    assert (video.shape, video.dtype) == ((10, 16, 24, 3), np.uint8)
    with torch.no_grad():
        images = vae.network.decode(latents / vae.network.config.scaling_factor).sample
    exact = ((images / 2 + 0.5) * 255).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(video - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("coder", ["encode", "decode"])
def test_memory_does_not_grow_with_the_number_of_frames(vae: Vae, monkeypatch: pytest.MonkeyPatch, coder: str) -> None:
    monkeypatch.setattr("cinemo.networks.frozen._CHUNK_PIXELS", 4 * 16 * 24)
    peaks, results = [], []
    for count in (8, 32):
        given = frames(count) if coder == "encode" else torch.randn(count, vae.latent_channels, 2, 3)
        with PeakMemory() as memory:
            results.append(getattr(vae, coder)(given))
        peaks.append(memory.peak - count * 16 * 24 * 3 * 5)  # the frames themselves, once float and once bytes
    assert [len(result) for result in results] == [8, 32]
    assert peaks[1] < 1.1 * peaks[0]


def test_temporal_decoding_goes_in_fourteens_and_truncates(encoders: Path) -> None:
    temporal = Vae(str(encoders / "temporal"))
    latents = torch.randn(16, 4, 2, 3)
    video = temporal.decode(latents)
    with torch.no_grad():
        scaled = latents / temporal.network.config.scaling_factor
        images = torch.cat([temporal.network.decode(part, num_frames=len(part)).sample for part in scaled.split(14)])
    exact = ((images / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    gap = exact - video
    assert gap.min() >= -1e-3
    assert gap.max() < 1 + 1e-3
    assert gap.max() > 0.9
    # It mixes frames: a frame decoded alone is another picture.
    assert not np.array_equal(temporal.decode(latents[:1])[0], video[0])


def test_text_states_are_padded_and_unmasked(encoders: Path) -> None:
    encoder = TextEncoder(str(encoders / "text_encoder"), str(encoders / "tokenizer"))
    texts = ["", "a dog", "many words " * 200]
    states = encoder.encode(texts)
    assert states.shape == (3, encoder.tokenizer.length, WIDTH)
    torch.testing.assert_close(encoder.encode(texts[1:2]), states[1:2])
    tokens = encoder.tokenizer.words(
        texts[1], padding="max_length", max_length=encoder.tokenizer.length, return_tensors="pt"
    )
    with torch.no_grad():
        torch.testing.assert_close(encoder.network(tokens.input_ids)[0], states[1:2])
    assert not states.is_inference()


@pytest.mark.parametrize("missing", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_missing_vae_file_is_named(missing: str, encoders: Path, tmp_path: Path) -> None:
    shutil.copytree(encoders / "vae", tmp_path / "vae")
    (tmp_path / "vae" / missing).unlink()
    with pytest.raises(InputError, match=f"{missing}.*missing"):
        Vae(str(tmp_path / "vae"))


def test_a_missing_text_file_is_named(encoders: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"tokenizer\.json.*missing"):
        TextEncoder(str(encoders / "text_encoder"), str(tmp_path / "empty"))
    with pytest.raises(InputError, match="no such file or directory"):
        TextEncoder(str(tmp_path / "nowhere"), str(encoders / "tokenizer"))


def test_another_class_is_refused(encoders: Path, tmp_path: Path) -> None:
    shutil.copytree(encoders / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(InputError, match="is for VQModel"):
        Vae(str(tmp_path / "vae"))


@pytest.mark.golden
def test_golden_vae_names_and_shapes(say: Callable[[str], None]) -> None:
    """The installed diffusers still builds the published autoencoders, name by name."""
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

    widths = (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "block_out_channels": widths, "layers_per_block": 2}
    files = golden_files("cinemo/vae_*schema.json")
    for path in files:
        with torch.device("meta"):
            if "temporal" in path.name:
                network = AutoencoderKLTemporalDecoder(**blocks)
            else:
                network = AutoencoderKL(**blocks, up_block_types=("UpDecoderBlock2D",) * 4)
        shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
        assert shapes == {name: shape for name, (shape, _) in json.loads(path.read_text()).items()}, path.name
    say(f"golden vae schemas: {len(files)} files")


def test_image_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    save_image_encoder(tmp_path)
    encoder = ImageEncoder(str(tmp_path))
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((40, 96), (64, 24))]
    tokens = encoder.encode(images)
    assert tokens.shape == (2, 1 + 16, WIDTH)
    network = CLIPVisionModel.from_pretrained(tmp_path).eval()
    pixels = torch.stack([encoder.prepare(image) for image in images])
    torch.testing.assert_close(tokens, network(pixels).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_a_picture_is_prepared_as_the_published_weights_saw_it() -> None:
    """A wide picture is squeezed into the square with its corners at the square's, and blurred where it shrinks."""
    height, width, side = 40, 96, 32
    ramp_HW = np.tile(np.arange(width, dtype=np.uint8) * 2, (height, 1))

    made_HW = ImageEncoder.square(np.stack([ramp_HW] * 3, axis=-1), side)[1]
    columns = np.linspace(0, width - 1, side)  # not (j + 0.5) * 3 - 0.5, which is 1 off at both ends
    expected_W = (columns * 2 / 255 - ImageEncoder.MEAN[1]) / ImageEncoder.DEVIATION[1]
    torch.testing.assert_close(
        made_HW[:, 2:-2], torch.tensor(expected_W[2:-2]).float().expand(side, -1), atol=5e-3, rtol=0
    )

    stripes_HW = np.tile(np.array([0, 255], np.uint8), (height, width // 2))
    made_HW = ImageEncoder.square(np.stack([stripes_HW] * 3, axis=-1), side)[1]
    unblurred = 1 / ImageEncoder.DEVIATION[1]
    assert float(made_HW[:, 2:-2].max() - made_HW[:, 2:-2].min()) < 0.2 * unblurred, "stripes of a pixel become grey"


def test_what_is_no_image_encoder_is_refused(encoders: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json is of model_type clip_text_model, expected clip_vision_model"):
        ImageEncoder(str(encoders / "text_encoder"))
    save_image_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors \(or pytorch_model\.bin\) is missing there"):
        ImageEncoder(str(tmp_path))


def test_scaling_is_known_without_loading(encoders: Path, tmp_path: Path) -> None:
    for name in ("vae", "temporal"):
        copy = Path(shutil.copytree(encoders / name, tmp_path / name))
        config = json.loads((copy / "config.json").read_text())
        for values in (config, config | {"scaling_factor": 0.5, "shift_factor": 0.25}):
            values = {key: value for key, value in values.items() if name == "vae" or key != "shift_factor"}
            (copy / "config.json").write_text(json.dumps(values))
            loaded = Vae(str(copy))
            assert vae_scaling(str(copy)) == (loaded.scale, loaded.shift)
        del config["scaling_factor"]  # as in Stable Diffusion 1's own folder
        (copy / "config.json").write_text(json.dumps(config))
        assert vae_scaling(str(copy))[0] == Vae(str(copy)).scale == 0.18215


def test_a_network_is_its_weights_and_its_configuration(encoders: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(encoders / "text_encoder", tmp_path / "text"))
    digest = network_digest(str(encoders / "text_encoder"))
    (copy / "README.md").write_text("read by nobody")
    (copy / "pytorch_model.bin").write_bytes(b"not loaded, safetensors come first")
    assert network_digest(str(copy)) == digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert network_digest(str(copy)) != digest
    with pytest.raises(InputError, match=r"config\.json is missing there"):
        network_digest(str(tmp_path))


def test_tokens_that_are_read_are_counted(encoders: Path) -> None:
    places = str(encoders / "tokenizer"), str(encoders / "text_encoder")
    tokenizer, encoder = Tokenizer(*places), TextEncoder(places[1], places[0])
    whole, longer = "x" * 75, "x" * 76  # every letter is a token of this tokenizer
    assert (tokenizer.count(""), tokenizer.count(whole), tokenizer.count(longer)) == ((0, 75), (75, 75), (76, 75))
    assert tokenizer.warning(whole) is None
    assert tokenizer.warning(longer) == (
        "the prompt has 76 tokens, of which the text encoder reads the first 75; shorten it"
    )
    read, cut, other = encoder.encode(["x" * 74 + "y", "x" * 75 + "y", "x" * 75 + "z"])
    assert torch.equal(cut, other), "what is cut has no effect"
    assert not torch.equal(read, cut)
