"""A dataset is checked to the last byte: every kind of damage is found and named, and nothing is changed."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cinemo import cli, storage
from cinemo.checksums import checksum
from cinemo.config import Recipe
from cinemo.data.dataset import shards, sidecars
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.dataset.verify import canary, verify
from cinemo.recipes import override
from cinemo.types import InputError, RunError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(with_fields: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_fields, tmp_path / "copy"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, sort_keys=True) + "\n")


def fix_up(dataset: Path, shard: int) -> None:
    """Make record, index and totals agree with an altered tar: what a careless repair does."""
    tar = dataset / f"shards/shard-{shard:06d}.tar"
    digest = checksum([tar.read_bytes()])
    change_json(tar.with_suffix(".json"), lambda record: record.update(checksum=digest))
    for name in sidecars.EXTENSIONS:
        place = dataset / f"fields/{name}/shard-{shard:06d}.json"
        change_json(place, lambda record: record.update(shard_checksum=digest))
    index_again(dataset)


def index_again(dataset: Path) -> None:
    records = [json.loads(path.read_text()) for path in sorted((dataset / "shards").glob("*.json"))]
    (dataset / "index.parquet").write_bytes(shards.index_bytes(records))


def change_ssim(dataset: Path, shard: int) -> None:
    """Another score in the first sample of a shard, with as many digits, so that nothing else moves."""
    tar = dataset / f"shards/shard-{shard:06d}.tar"
    content = tar.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as file:
        info = next(iter(file))
    text = content[info.offset_data : info.offset_data + info.size].decode()
    ssim = json.dumps(json.loads(text)["ssim"])
    other = ssim[:3] + str((int(ssim[3]) + 1) % 10) + ssim[4:]
    content = content.replace(text.encode(), text.replace(f'"ssim": {ssim}', f'"ssim": {other}').encode())
    tar.write_bytes(content)
    (dataset / f"columns/shard-{shard:06d}.parquet").unlink()
    fix_up(dataset, shard)


@pytest.mark.ray
def test_a_sound_dataset(with_fields: Path, field_recipe: Recipe) -> None:
    before = {path: path.stat().st_mtime_ns for path in with_fields.rglob("*")}
    result = verify(str(with_fields), field_recipe, 18)
    assert (result["shards"], result["sidecars"], result["samples"]) == (3, 18, 18)
    assert result["bytes"] == sum(path.stat().st_size for path in with_fields.rglob("*.tar"))
    assert result["canary"] == {"samples": 18, "equal": 18, "skipped": 0, "worst": 0.0, "faults": [], "unreadable": []}
    assert {path: path.stat().st_mtime_ns for path in with_fields.rglob("*")} == before


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "byte of a tar": (
        lambda d: flip(d / "shards/shard-000001.tar", 3000),
        r"1 fault: shards/shard-000001\.tar: has blake3 \w+\.\.\., its record says blake3",
    ),
    "byte of a sidecar": (
        lambda d: flip(d / "fields/flow/shard-000002.tar", 600),
        r"1 fault: fields/flow/shard-000002\.tar: has blake3",
    ),
    "cut tar": (
        lambda d: (d / "shards/shard-000001.tar").write_bytes(b"x" * 512),
        r"1 fault: shards/shard-000001\.tar: has 512 bytes, its record says",
    ),
    "ssim of a record": (
        lambda d: change_json(d / "shards/shard-000001.json", lambda r: r["ssim"].update(min=0.123)),
        r"2 faults: shards/shard-000001\.tar: the ssim of its samples does not add up.*; index\.parquet: ssim_min is",
    ),
    "ssim of a tar, sha fixed up": (
        lambda d: change_ssim(d, 0),
        r"1 fault: shards/shard-000000\.tar: the ssim of its samples does not add up to that of its record",
    ),
    "columns of another shard": (
        lambda d: shutil.copy(d / "columns/shard-000001.parquet", d / "columns/shard-000000.parquet"),
        r"1 fault: columns/shard-000000\.parquet: says otherwise than the shard; remove it",
    ),
    "lost record": (
        lambda d: (d / "shards/shard-000001.json").unlink(),
        r"shards/shard-000001\.json: is missing",
    ),
    "lost sidecar": (
        lambda d: (d / "fields/flow/shard-000001.tar").unlink(),
        r"1 fault: fields/flow/shard-000001\.tar: is missing",
    ),
    "record that is no JSON": (
        lambda d: (d / "fields/flow/shard-000001.json").write_text("{"),
        r"1 fault: fields/flow/shard-000001\.json: is not JSON",
    ),
    "record without an entry": (
        lambda d: change_json(d / "shards/shard-000001.json", lambda r: r.pop("checksum")),
        r"shards/shard-000001\.json: lacks checksum",
    ),
    "record with nonsense": (
        lambda d: change_json(d / "shards/shard-000001.json", lambda r: r["members"].pop("array_shape")),
        r"1 fault: shards/shard-000001: its files are malformed",
    ),
    "stray shard": (
        lambda d: shutil.copy(d / "shards/shard-000000.tar", d / "shards/shard-000009.tar"),
        r"1 fault: shards/shard-000009\.tar: belongs to no committed shard",
    ),
    "what a killed process left": (
        lambda d: (d / "fields/flow/.shard-000000.tar.x.partial").write_bytes(b""),
        r"1 fault: fields/flow/\.shard-000000\.tar\.x\.partial: belongs to no committed shard",
    ),
    "stray file": (lambda d: (d / "notes.txt").write_text("?"), r"1 fault: notes\.txt: belongs to no committed shard"),
    "total": (
        lambda d: change_json(d / "dataset.json", lambda info: info.update(samples=17)),
        r"1 fault: dataset\.json: samples is 17 there and 18 here \(records\)",
    ),
    "field's total": (
        lambda d: change_json(d / "fields/flow.json", lambda info: info.update(samples=17)),
        r"1 fault: fields/flow\.json: samples is 17 there and 18 here \(records\)",
    ),
    "ledger": (
        lambda d: (d / "quarantine/shard-000000.jsonl").unlink(),
        r"1 fault: quarantine/shard-000000\.jsonl: lists \{\}, the records say \{'unreadable': 1\}",
    ),
}


@pytest.mark.ray
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(copy: Path, field_recipe: Recipe, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(copy)
    with pytest.raises(RunError, match=message):
        verify(str(copy), field_recipe, 0)


@pytest.mark.ray
def test_a_key_that_is_there_twice(copy: Path, field_recipe: Recipe) -> None:
    for kind in ("tar", "json"):
        shutil.copy(copy / f"shards/shard-000000.{kind}", copy / f"shards/shard-000003.{kind}")
    shutil.copy(copy / "quarantine/shard-000000.jsonl", copy / "quarantine/shard-000003.jsonl")
    change_json(copy / "shards/shard-000003.json", lambda record: record.update(shard=3))
    index_again(copy)
    shutil.rmtree(copy / "fields")
    change_json(copy / "dataset.json", lambda info: info.update(shards=4, samples=24, quarantined=4))
    with pytest.raises(RunError, match=r"sample 000000000-0: appears 2 times; sample 000000000-1: appears 2 times"):
        verify(str(copy), field_recipe, 0)


@pytest.mark.ray
def test_a_perfect_forgery_is_found_by_the_canary(copy: Path, field_recipe: Recipe) -> None:
    change_ssim(copy, 0)
    tar = (copy / "shards/shard-000000.tar").read_bytes()
    record = json.loads((copy / "shards/shard-000000.json").read_text())
    members = shards.Members(**record["members"])
    scores = [shards.read_sample(memoryview(tar), members, k).ssim for k in range(len(members.keys))]
    change_json(copy / "shards/shard-000000.json", lambda r: r.update(ssim=shards.ssim_statistics(scores)))
    index_again(copy)
    verify(str(copy), field_recipe, 0)
    with pytest.raises(
        RunError, match=rf"1 fault: sample {members.keys[0]}: ssim is {scores[0]}, but 0\.\d+ when made again"
    ):
        verify(str(copy), field_recipe, 18)


@pytest.mark.ray
def test_another_vae_is_found_twice(copy: Path, field_recipe: Recipe, tmp_path: Path) -> None:
    vae = Path(shutil.copytree(field_recipe.encoders.vae, tmp_path / "vae"))
    change_json(vae / "config.json", lambda config: config.update(scaling_factor=config["scaling_factor"] * 1.05))
    other = override(field_recipe, [f"encoders.vae={vae}"])
    with pytest.raises(RunError, match=r"dataset\.json: vae is '\w+' there and '\w+' here; .*vae_scaling is"):
        verify(str(copy), other, 1)
    result = canary(DatasetIndex.load(str(copy)), other, 3, 0)
    assert (result.equal, len(result.faults)) == (0, 3)
    assert "latents made again are off by 0.05 of their size, expected at most 0.01" in result.faults[0]


@pytest.mark.ray
def test_the_canary_is_drawn_from_its_seed_and_passes_over_lost_sources(
    with_fields: Path, field_recipe: Recipe, clips_folder: Path
) -> None:
    index = DatasetIndex.load(str(with_fields))
    assert canary(index, field_recipe, 5, 3) == canary(index, field_recipe, 5, 3)
    path = clips_folder / "film 7.mp4"
    content = path.read_bytes()
    path.unlink()
    try:
        result = canary(index, field_recipe, 99, 3)
    finally:
        path.write_bytes(content)
    assert (result.samples, result.equal, result.skipped, result.faults) == (18, 16, 2, [])


@pytest.mark.ray
def test_the_command(copy: Path, field_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.json").write_text(field_recipe.to_json())
    main = runpy.run_path(str(ROOT / "pipelines/precompute.py"))["main"]
    words = ["--recipe", str(tmp_path / "recipe.json"), "--output", str(copy), "--verify", "--sample", "2"]
    cli.run(main, words)
    printed = capsys.readouterr().out
    assert (
        "18 samples in 3 shards and 18 sidecars (first_frame, flow, frame_tokens, frames, image_tokens, text_states)"
        in printed
    )
    assert "2 samples made again: 2 equal bit for bit" in printed
    (copy / "notes.txt").write_text("?")
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, words)
    assert stopped.value.code == 1
    assert "1 fault: notes.txt: belongs to no committed shard" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.s3
def test_on_s3(with_fields: Path, field_recipe: Recipe, s3_endpoint: str) -> None:
    storage.upload(with_fields, "s3://cinemo-test/verified")
    assert verify("s3://cinemo-test/verified", field_recipe, 2)["canary"]["equal"] == 2
    storage.remove("s3://cinemo-test/verified/shards/shard-000002.tar")
    with pytest.raises(RunError, match=r"1 fault: shards/shard-000002\.tar: is missing"):
        verify("s3://cinemo-test/verified", field_recipe, 0)


def test_there_must_be_a_finished_dataset(tmp_path: Path, small_recipe: Recipe) -> None:
    with pytest.raises(InputError, match="no dataset there"):
        verify(str(tmp_path), small_recipe)
