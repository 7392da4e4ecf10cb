"""RAFT of torchvision for stored flow, in a process of its own: other libraries do other things where torchvision is.

CPU builds of torch cannot load the operators of the wheel on PyPI, of which RAFT needs none: what describes them is
left out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cinemo.networks.raft import check_raft
from cinemo.types import InputError

SCRIPT = """
import json, sys, types
import numpy as np, torch
if not torch.version.cuda:
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
from torchvision.models.optical_flow import raft_large, raft_small
from cinemo.networks.raft import Raft, check_raft
from cinemo.types import InputError

folder, said = sys.argv[1], {}
torch.manual_seed(0)
frames = np.random.default_rng(0).integers(0, 256, (6, 128, 136, 3), dtype=np.uint8)
given = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
for build, name in ((raft_small, "small"), (raft_large, "large")):
    network = build().eval()
    torch.save(network.state_dict(), f"{folder}/{name}.pth")
    check_raft(f"{folder}/{name}.pth", (128, 136))
    raft = Raft(f"{folder}/{name}.pth")
    pairs = slice(0, 6) if name == "small" else slice(2, 4)
    flow = raft.dense_flow(frames[pairs], (16, 17))
    with torch.inference_mode():
        pixels = network(given[pairs][:-1], given[pairs][1:])[-1].numpy()
    cells = pixels.reshape(len(pixels), 2, 16, 8, 17, 8).mean((3, 5))
    said[name] = [str(flow.dtype), list(flow.shape), float(np.abs(flow - cells).max()), float(np.abs(cells).max())]
    if name == "small":
        alone = raft.dense_flow(frames[3:5], (16, 17))
        said["alone"] = float(np.abs(alone[0].astype(np.float32) - flow[3]).max())
torch.save({"x": torch.zeros(3)}, f"{folder}/other.pth")
try:
    Raft(f"{folder}/other.pth")
except InputError as error:
    said["other"] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = os.environ.get("TORCHVISION_FOLDER", "")
    if not place and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not here: pip install --no-deps --target FOLDER, and set TORCHVISION_FOLDER")
    paths = os.pathsep.join((*filter(None, sys.path), place))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("raft"))],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pairs"), [("small", 5), ("large", 1)])
def test_flow_is_torchvisions_averaged_over_cells(said: dict[str, Any], name: str, pairs: int) -> None:
    dtype, shape, difference, largest = said[name]
    assert (dtype, shape) == ("float16", [pairs, 2, 16, 17])
    assert difference <= 1e-3 * largest  # float16, and batches of other sizes


@pytest.mark.slow
def test_a_pair_of_frames_is_measured_on_its_own(said: dict[str, Any]) -> None:
    assert said["alone"] <= 1e-3 * said["small"][3]


@pytest.mark.slow
def test_other_weights_are_named(said: dict[str, Any]) -> None:
    assert "other.pth: is no RAFT of torchvision" in said["other"]


def test_what_cannot_be_measured_is_told_before_anything_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.size is 96x64, expected sides of at least 128 for RAFT"):
        check_raft(str(tmp_path / "raft.pth"), (64, 96))
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(InputError, match="install the torchvision that belongs to this torch"):
            check_raft(str(tmp_path / "raft.pth"), (128, 128))
