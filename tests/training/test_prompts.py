"""One's own pictures and prompts on sample sheets: read from tables and folders, tried before anything starts, kept by
the run, animated with seeds that make sheets compare."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cinemo.bundle import load_bundle
from cinemo.config import Recipe
from cinemo.media.mp4 import read_metadata
from cinemo.media.video import probe
from cinemo.methods import build_method
from cinemo.networks.frozen import Vae
from cinemo.recipes import RECIPES, override
from cinemo.training.checkpoint import snapshots
from cinemo.training.report import prompts
from cinemo.training.report.prompt_sheets import animated, write_prompts
from cinemo.training.run import worker
from cinemo.training.run.batch import FrozenStates
from cinemo.types import InputError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def _picture(path: Path, level: int, size: tuple[int, int] = (40, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, level, size[0] * size[1] * 3).reshape(*size, 3)
    Image.fromarray(ramp.astype(np.uint8)).save(path)
    return path


def _jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def table(tmp_path: Path) -> str:
    _picture(tmp_path / "in" / "a.png", 200)
    _picture(tmp_path / "in" / "b.jpg", 90)
    rows = [{"image": "in/a.png", "prompt": "waves", "motion_bucket": 3}, {"image": "in/b.jpg", "prompt": "a dog"}]
    return _jsonl(tmp_path / "own.jsonl", [*rows, rows[1]])


def test_tables_and_folders_say_the_same(table: str, small: Recipe, tmp_path: Path) -> None:
    made = prompts.read(table, small)
    assert [prompt.text for prompt in made] == ["waves", "a dog", "a dog"]
    assert made[0].files == {"image": str(tmp_path / "in" / "a.png")}
    assert made[0].controls["motion_bucket"] == 3
    seeds = [prompt.controls["seed"] for prompt in made]
    assert len(set(seeds)) == 3, "also of equal rows"
    reordered = _jsonl(tmp_path / "new.jsonl", [json.loads(line) for line in Path(table).read_text().splitlines()[1:2]])
    assert prompts.read(reordered, small)[0].controls["seed"] == seeds[1], "whatever stands beside a row"

    rows = [json.loads(line) for line in Path(table).read_text().splitlines()]
    with (tmp_path / "own.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "prompt", "motion_bucket"])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own.parquet")
    for name in ("own.csv", "own.parquet"):
        same = prompts.read(str(tmp_path / name), small)
        assert [(one.text, one.files, one.controls) for one in same] == [
            (one.text, one.files, one.controls) for one in made
        ]
    (tmp_path / "in" / "a.txt").write_text("waves\n")
    with pytest.raises(InputError, match=r"b\.jpg has no prompt beside it; expected b\.txt"):
        prompts.read(str(tmp_path / "in"), small)
    (tmp_path / "in" / "b.txt").write_text("a dog")
    folder = prompts.read(str(tmp_path / "in"), small)
    assert [(one.text, one.files) for one in folder] == [(one.text, one.files) for one in made[:2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has 0 rows, expected 1..64"),
        ('{"image": "a.png"}', r"bad.jsonl:1: has no prompt"),
        ('{"prompt": "a"}', r"bad.jsonl:1: has no image"),
        ("\n[1]", r"bad.jsonl:2: is no object"),
        ("{", r"bad.jsonl: cannot be read \("),
        ('{"image": "a.png", "prompt": "a"}\n' * 65, "has 65 rows"),
    ],
)
def test_what_is_no_table_is_refused(content: str, message: str, small: Recipe, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(InputError, match=f"^validation {tmp_path}.*{message}"):
        prompts.read(str(tmp_path / "bad.jsonl"), small)
    with pytest.raises(InputError, match=r"nowhere: is not there; expected a table or a folder"):
        prompts.read(str(tmp_path / "nowhere"), small)


def test_rows_are_tried_before_anything_starts(
    table: str, small: Recipe, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image": "in/gone.png", "prompt": "a"}, {"image": "in/a.png", "prompt": "b", "motion_bucket": 99}]
    rows += [{"image": "in/a.png", "prompt": "c", "speed": 1}, {"image": "in/a.png", "prompt": "d"}]
    place = _jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError, match=r"bad\.jsonl: 3 of 4 rows cannot be animated, as said above"):
        worker.run(small, dataset, str(tmp_path / "run"), validation=place)
    said = capsys.readouterr().out.splitlines()
    assert f"validation {place}:1: image {tmp_path}/in/gone.png: cannot be read (No such file or directory)" in said
    assert f"validation {place}:2: motion_bucket is 99, expected a whole number 0..19" in said
    assert any(line.startswith(f"validation {place}:3: speed: cinemo-tiny has no such control") for line in said)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"bad\.jsonl:1: image .*gone\.png: cannot be read"):
        worker.run(small, dataset, str(tmp_path / "run"), validation=_jsonl(tmp_path / "bad.jsonl", rows[:1]))


def test_a_run_keeps_its_own(table: str, small: Recipe, tmp_path: Path) -> None:
    output, given = str(tmp_path / "run"), prompts.read(table, small)
    assert prompts.kept(output, small) == []
    prompts.keep(given, output)
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    again = prompts.kept(output, override(small, ["train.seed=5"]))
    assert [(one.text, one.controls) for one in again] == [(one.text, one.controls) for one in given]
    assert prompts.faults(again, small) == []
    assert prompts.faults(given, small) != []
    prompts.keep(again[:1], output)
    assert len(prompts.kept(output, small)) == 1
    prompts.drop(output)
    assert prompts.kept(output, small) == []


def test_prompts_are_animated_as_a_bundle_would(table: str, small: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    method, frozen = build_method(small).eval(), FrozenStates.of(small)
    torch.nn.init.normal_(method.unet.add_embedding.linear_2.weight)  # zero in a fresh network: buckets have no effect
    rows = prompts.read(table, small)
    made = animated(small, method, frozen, rows, CPU, torch.float32)
    alone = animated(small, method, FrozenStates(None), rows[1:2], CPU, torch.float32)  # which loads its encoders
    torch.testing.assert_close(alone[0].latents_CFHW, made[1].latents_CFHW)
    assert (made[0].settings["motion_bucket"], made[0].settings["steps"]) == (3, prompts.STEPS)

    sheet = write_prompts(str(tmp_path / "run"), small, 100, Vae(small.encoders.vae), made)
    assert [uri.removeprefix(f"{tmp_path}/run/samples/") for uri in sheet.uris] == [
        "step-000100-prompts.png",
        *(f"step-000100/prompt-{number:02d}.mp4" for number in range(3)),
    ]
    assert (sheet.step, [*sheet.motion]) == (100, ["prompts"])
    info = probe(sheet.uris[1])
    assert (info.frames, info.height, info.width) == (4, 32, 32)
    settings = json.loads(read_metadata(sheet.uris[1])["comment"])
    assert settings | {"step": 100, "prompt": "waves", "motion_bucket": 3} == settings
    assert settings["seed"] == rows[0].controls["seed"]
    assert Image.open(sheet.uris[0]).size == (4 * 34 - 2, 3 * (32 + 13 + 2) - 2)

    from cinemo.animate import animate
    from cinemo.bundle import save_bundle

    save_bundle(tmp_path / "bundle", small, method.networks, {})
    shown = animate(load_bundle(tmp_path / "bundle"), rows[0].request(small))
    torch.testing.assert_close(shown.latents_CFHW, made[0].latents_CFHW, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamicrafter-tiny", "trip-tiny", "longer-tiny"])
def test_every_method_animates_prompts(name: str, table: str) -> None:
    recipe = override(RECIPES[name](), ["train.init=null"])
    row = prompts.read(table, recipe)[1]
    row = replace(row, controls={**row.controls, "steps": 2})
    torch.manual_seed(0)
    method = build_method(recipe).eval()
    (made,) = animated(recipe, method, FrozenStates(None), [row], CPU, torch.float32)
    assert torch.isfinite(made.latents_CFHW).all()
    assert made.latents_CFHW.shape[1] == recipe.data.frames


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.ray
def test_a_training_shows_them_and_a_resume_goes_on_with_them(
    table: str, small: Recipe, dataset: str, tmp_path: Path
) -> None:
    """With averages of both kinds; the resume finds neither table nor pictures, and another number of workers."""
    settings = ["train.max_steps=4", "train.checkpoint_every=2", "train.sample_every=4", "train.sample_count=1"]
    recipe = override(small, [*settings, "train.ema_decay=0.9", "train.posthoc_ema=[0.05,0.1]", "train.canary=0"])
    recipe_file, output = tmp_path / "recipe.json", tmp_path / "run"
    recipe_file.write_text(recipe.to_json())

    def train(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "pipelines/train.py"), "--recipe", str(recipe_file), "--data", dataset]
        done = subprocess.run(
            [*command, "--output", str(output), *arguments], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    train("--validation", table)
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    said = train("--max-steps", "6", "--set", "train.workers=2", "--set", "train.micro_batch=1")
    assert f"sheets go on with the 3 prompts of {output}/validation" in said
    samples = output / "samples"
    assert {path.name for path in samples.glob("*.png")} == {
        f"step-{step:06d}{ending}.png" for step in (4, 6) for ending in ("", "-prompts")
    }
    assert len([*samples.glob("step-000006/prompt-*.mp4")]) == 3
    motion = json.loads((output / "motion.json").read_text())
    assert motion["6"].keys() == {"clips", "bucket-03", "bucket-16", "prompts"}
    assert {path.name for path in (output / snapshots.DIRECTORY).iterdir()} == {
        f"step-{step:08d}" for step in (2, 4, 6)
    }
