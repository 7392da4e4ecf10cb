"""How the shipped base is made: it goes on where it stopped, whatever it is cut into, and learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cinemo.config import Recipe
from cinemo.media.synthetic import DIRECTIONS
from cinemo.networks.frozen import TextEncoder
from cinemo.networks.weights import load_unet
from cinemo.recipes import load_recipe
from cinemo.types import InputError
from tools import tiny_base
from tools.tiny_base import Clips, Muon, Phase, TrainSettings, make_clips, orthogonal, planned, steady, train_base

pytestmark = pytest.mark.slow

PHASES = (Phase("a", 16, 4, 1e-3, 4.0, {"pan": 1}), Phase("b", 16, 6, 1e-3, 2.0, {"pan": 1, "object": 2, "flow": 1}))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    keys = ["model.block_out_channels=[32,32]", "model.norm_num_groups=8", "data.size=[32,48]", "data.frames=6"]
    return load_recipe("cinemo-tiny", [*keys, "train.init=null"])


@pytest.fixture(scope="module")
def clips(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Clips:
    directory = tmp_path_factory.mktemp("clips")
    made = make_clips(directory, recipe, 24, 3, 1, lambda line: None, chunk=12)
    (directory / "chunk-0001.json").unlink()  # as if stopped while it was written
    again = make_clips(directory, recipe, 24, 3, 1, lambda line: None, chunk=12)
    np.testing.assert_array_equal(made.latents_NFCHW, again.latents_NFCHW)
    assert made.facts == again.facts
    return made


def test_chunks_of_something_else_or_damaged_ones_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    make_clips(tmp_path, recipe, 2, 3, 1, lambda line: None, chunk=2)
    with pytest.raises(InputError, match=r"chunk-0000\.json: holds clips of another seed"):
        make_clips(tmp_path, recipe, 2, 4, 1, lambda line: None, chunk=2)
    latents = tmp_path / "chunk-0000.npy"
    latents.write_bytes(latents.read_bytes()[:-100])
    with pytest.raises(InputError, match="remove the chunk, it is then rendered again"):
        make_clips(tmp_path, recipe, 2, 3, 1, lambda line: None, chunk=2)


@pytest.mark.parametrize("lie", [b"not a checkpoint", b""])
def test_a_state_that_is_none_is_said_in_one_line(recipe: Recipe, clips: Clips, tmp_path: Path, lie: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(lie)
    with pytest.raises(InputError, match="is not a training state") as caught:
        train_base(tmp_path, recipe, clips, PHASES, settings(), lambda line: None)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "state.pt").read_bytes() == lie  # nothing stored is lost


def settings(**changed: object) -> TrainSettings:
    return TrainSettings(batch=4, checkpoint_every=2, **changed)  # type: ignore[arg-type]


def weights(output: Path) -> dict[str, torch.Tensor]:
    state = torch.load(output / "state.pt", weights_only=True)
    return {**state["unet"], **{f"text.{name}": value for name, value in state["text_encoder"].items()}}


@pytest.fixture(scope="module")
def straight(recipe: Recipe, clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("straight")
    made = train_base(output, recipe, clips, PHASES, settings(), lambda line: None)
    assert made["samples"] == 32
    return output


@pytest.mark.release
def test_stopped_and_taken_up_it_ends_at_the_same_weights(
    recipe: Recipe, clips: Clips, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, calls = tiny_base._batch, 0

    def breaks(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return batch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tiny_base, "_batch", breaks)
    with pytest.raises(KeyboardInterrupt):
        train_base(tmp_path, recipe, clips, PHASES, settings(), lambda line: None)
    lines: list[str] = []
    train_base(tmp_path, recipe, clips, PHASES, settings(), lines.append)
    assert "continuing at step 4" in lines
    for name, value in weights(straight).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, rtol=0, atol=0, msg=name)


def test_two_processes_learn_what_one_does(recipe: Recipe, clips: Clips, straight: Path, tmp_path: Path) -> None:
    train_base(tmp_path, recipe, clips, PHASES, settings(processes=2), lambda line: None)
    one, two = weights(straight), weights(tmp_path)
    start = {**build(recipe), **text_start(recipe)}
    moved = sum(float((one[name] - start[name]).square().sum()) for name in start)
    apart = sum(float((one[name] - two[name]).square().sum()) for name in start)
    assert apart < 0.01 * moved


def build(recipe: Recipe) -> dict[str, torch.Tensor]:
    from cinemo.methods import build_method

    torch.manual_seed(settings().seed)
    return build_method(recipe).unet.state_dict()


def text_start(recipe: Recipe) -> dict[str, torch.Tensor]:
    text = TextEncoder(recipe.encoders.text_encoder, recipe.encoders.tokenizer)
    return {f"text.{name}": value for name, value in text.network.state_dict().items()}


def test_what_it_writes_loads_and_is_the_average(recipe: Recipe, straight: Path) -> None:
    unet = load_unet(recipe.model, str(straight / "unet"))
    state = torch.load(straight / "state.pt", weights_only=True)
    for parameter, average in zip(unet.parameters(), state["averages"], strict=False):
        torch.testing.assert_close(parameter, average.half())
    text = TextEncoder(str(straight / "text_encoder"), recipe.encoders.tokenizer)
    assert text.encode(["the camera pans up"]).shape == (1, 32, recipe.model.cross_attention_dim)


def test_a_clip_backwards_has_the_opposite_words(recipe: Recipe, clips: Clips) -> None:
    seen: dict[bytes, set[str]] = {}
    for step in range(12):
        batch = tiny_base._batch(clips, PHASES[0], settings(), step, 0, recipe)
        assert batch.noise_BCFHW.shape[2] == PHASES[0].frames - 1
        for video, caption in zip(batch.video_BCFHW, batch.texts["text"], strict=True):
            seen.setdefault(video[:, 0].numpy().tobytes(), set()).add(caption)
    kinds = [caption for captions in seen.values() for caption in captions if caption]
    assert all("pans" in caption for caption in kinds)
    # One clip has two first frames, its own and its last, and each of them words for one direction alone.
    for captions in seen.values():
        named = {way for way in DIRECTIONS for caption in captions if caption.split(" across ")[0].endswith(way)}
        assert len(named) <= 1


def test_steady_clips_say_nothing_of_the_middle_speed(clips: Clips) -> None:
    rows = [row | {"number": number} for number, row in enumerate(clips.facts)]
    kept = steady(Clips(clips.latents_NFCHW, rows))
    speeds = {row["speed"] for row in kept.facts if row["direction"]}
    assert speeds
    assert None not in speeds
    for row in kept.facts:
        assert (row["speed"] in str(row["caption"]).split()) == (row["speed"] in ("slowly", "quickly"))
    assert np.array_equal(kept.latents_NFCHW, clips.latents_NFCHW[[row["number"] for row in kept.facts]])


def test_clips_of_a_method_that_sees_flow_carry_it(tmp_path: Path) -> None:
    recipe = load_recipe("longer-tiny", ["data.size=[32, 48]", "data.frames=6"])
    clips = make_clips(tmp_path, recipe, 8, 3, 1, lambda line: None, chunk=8)
    assert clips.flow_NF2HW is not None
    assert clips.flow_NF2HW.shape == (8, 5, 2, 4, 6)
    index = next(number for number, row in enumerate(clips.facts) if row["kind"] == "pan")
    forward, back = (tiny_base._sample(clips, PHASES[1], index, way, 0) for way in (False, True))
    np.testing.assert_array_equal(back.fields["flow"], -forward.fields["flow"][::-1])
    x, y = DIRECTIONS[clips.facts[index]["direction"]]
    assert np.dot(np.float32(forward.fields["flow"]).mean((0, 2, 3)), (-x, -y)) > 0  # a camera's is the other way


def test_orthogonal_brings_singular_values_to_one() -> None:
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape), 5))
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.5


def test_muon_finds_the_minimum_of_a_quadratic() -> None:
    torch.manual_seed(0)
    target, weight = torch.randn(8, 12), torch.nn.Parameter(torch.zeros(8, 12))
    muon = Muon([weight])
    for step in range(300):
        muon.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        weight.grad = weight.detach() - target
        muon.step()
    assert float((weight.detach() - target).abs().max()) < 0.2


def test_a_share_of_the_plan_keeps_its_phases() -> None:
    assert [phase.name for phase in planned(0.1)] == [phase.name for phase in planned(1)]
    assert sum(phase.samples for phase in planned(0.5)) == sum(phase.samples for phase in planned(1)) / 2
