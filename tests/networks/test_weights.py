from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cinemo.networks.lavie_unet import LavieUNet, UNetConfig
from cinemo.networks.weights import WEIGHTS_NAME, load_unet, resolve, save_network, weights_digest
from cinemo.types import InputError

CONFIG = UNetConfig(
    block_out_channels=(32, 32),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=12,
    attention_head_dim=1,
    addition_time_embed_dim=16,
)
State = dict[str, torch.Tensor]


@pytest.fixture
def state() -> State:
    torch.manual_seed(0)
    return LavieUNet(**CONFIG.model_dump()).state_dict()


def is_loaded(unet: LavieUNet, state: State) -> bool:
    return all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())


def test_saved_weights_come_back_and_are_byte_stable(state: State, tmp_path: Path) -> None:
    unet = LavieUNet(**CONFIG.model_dump())
    unet.load_state_dict(state)
    save_network(unet, tmp_path / "a")
    loaded = load_unet(CONFIG, str(tmp_path / "a"))
    assert is_loaded(loaded, state)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    save_network(loaded, tmp_path / "b")
    assert weights_digest(str(tmp_path / "a")) == weights_digest(str(tmp_path / "b"))
    with torch.no_grad():
        loaded.conv_in.bias += 1  # training in place must not write through to the file
    assert is_loaded(load_unet(CONFIG, str(tmp_path / "a")), state)
    save_network(loaded, tmp_path / "b")
    assert weights_digest(str(tmp_path / "a")) != weights_digest(str(tmp_path / "b"))


@pytest.mark.parametrize("layout", ["plain", "ema", "without rotary"])
def test_published_layouts_of_pickled_files(layout: str, state: State, tmp_path: Path) -> None:
    kept = {name: value for name, value in state.items() if layout != "without rotary" or "rotary_emb" not in name}
    torch.save({"ema": kept, "step": 3} if layout == "ema" else kept, tmp_path / "weights.pt")
    assert is_loaded(load_unet(CONFIG, str(tmp_path / "weights.pt")), state)


def test_dtype_is_cast_on_request(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / WEIGHTS_NAME)
    assert load_unet(CONFIG, str(tmp_path)).dtype == torch.float32
    assert load_unet(CONFIG, str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_lavie_weights_have_no_motion_network(state: State, tmp_path: Path) -> None:
    lavie = {name: value for name, value in state.items() if not name.startswith("add_embedding")}
    save_file(lavie, tmp_path / "lavie.safetensors")
    with pytest.raises(InputError, match=r"4 entries.*missing add_embedding\.linear_1\.weight"):
        load_unet(CONFIG, str(tmp_path / "lavie.safetensors"))
    unet = load_unet(CONFIG, str(tmp_path / "lavie.safetensors"), motion_optional=True)
    assert not unet.add_embedding.linear_2.weight.any()
    unet(torch.randn(1, 4, 2, 4, 4), 1, torch.randn(1, 3, 12), torch.tensor([1.0]))


def test_every_key_that_does_not_fit_is_listed(state: State, tmp_path: Path) -> None:
    state["conv_in.weight"] = state["conv_in.weight"][:8].clone()
    state["stranger"] = torch.zeros(1)
    del state["conv_out.bias"]
    save_file(state, tmp_path / WEIGHTS_NAME)
    with pytest.raises(InputError) as caught:
        load_unet(CONFIG, str(tmp_path))
    for part in (
        "3 entries",
        "missing conv_out.bias",
        "extra stranger",
        "conv_in.weight is (8, 4, 3, 3), expected (32,",
    ):
        assert part in str(caught.value)


class Dangerous:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran-code"),)


def test_files_that_are_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    torch.save({"a": Dangerous()}, tmp_path / "dangerous.pt")
    torch.save({"a": 3}, tmp_path / "numbers.pt")
    for name in ("broken.safetensors", "dangerous.pt", "numbers.pt"):
        with pytest.raises(InputError, match=name):
            load_unet(CONFIG, str(tmp_path / name))
    assert not Path("ran-code").exists()
    with pytest.raises(InputError, match="no UNet weights there"):
        load_unet(CONFIG, str(tmp_path))
    with pytest.raises(InputError, match="not shipped"):
        resolve("package:tiny/nothing")


def test_digest_is_of_names_and_contents_not_of_places(tmp_path: Path) -> None:
    for directory, name in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / name).write_bytes(b"content")
    a, b, c = (weights_digest(str(tmp_path / name)) for name in "abc")
    assert a == b != c


def test_a_mapped_file_is_saved_as_it_was(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / WEIGHTS_NAME)
    save_network(load_unet(CONFIG, str(tmp_path)), tmp_path)  # onto itself
    assert all(torch.equal(value, state[name]) for name, value in load_file(tmp_path / WEIGHTS_NAME).items())


MEASURED = """
import sys, torch, safetensors.torch
from cinemo.networks.lavie_unet import UNetConfig
from cinemo.networks.weights import load_unet

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

config = UNetConfig(block_out_channels=(256, 512, 512, 512))
torch.zeros(1).half().float()
before = peak()
unet = load_unet(config, sys.argv[1], getattr(torch, sys.argv[2]))
for parameter in unet.parameters():
    parameter.detach().sum()  # a mapped page counts when it is read
print(peak() - before, sum(p.nbytes for p in unet.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc: Linux only")
@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "float32"), ("float16", "float32"), ("float32", "bfloat16")]
)
def test_loading_takes_little_more_than_the_weights(stored: str, wanted: str, tmp_path: Path) -> None:
    """A quarter of the published network, 0.9 GB in float32."""
    unet = LavieUNet(**UNetConfig(block_out_channels=(256, 512, 512, 512)).model_dump())
    state = {name: value.detach().to(getattr(torch, stored)) for name, value in unet.state_dict().items()}
    save_file(state, tmp_path / WEIGHTS_NAME)
    del unet, state
    printed = subprocess.check_output([sys.executable, "-c", MEASURED, str(tmp_path), wanted], text=True)
    peak, weights = map(int, printed.split())
    # 48 MB for the modules themselves and one tensor in two types: next to nothing at full size.
    assert 0.9 * weights < peak < 1.1 * weights + 48e6
