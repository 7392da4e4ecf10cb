"""Precompute from end to end on Ray: complete, repeatable byte for byte, unharmed by kills, honest about refusals."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import chaos
import numpy as np
import pyarrow as pa
import pytest
import ray.data
from data.small_data import digests, film, stamps
from faulty_s3 import FAULTS, FaultyS3

from cinemo import cli, s3, storage
from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex, read_ledger
from cinemo.data.dataset.verify import verify
from cinemo.data.loading.loader import LatentLoader
from cinemo.data.precompute import cluster, pools
from cinemo.data.precompute.graph import run
from cinemo.media.mp4 import write_video
from cinemo.recipes import override
from cinemo.types import InputError, RunError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dataset(
    ray_session: None, clips_folder: Path, small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("datasets") / "undisturbed"
    summary = run(small_recipe, str(clips_folder), str(directory))
    assert (summary["samples"], summary["quarantined"], summary["shards"], summary["done"]) == (9, 3, 3, 12)
    assert summary["reasons"] == {"too_few_frames": 1, "unreadable": 2}
    assert summary["stage_seconds"]["decode"] > 0
    return directory


@pytest.mark.ray
def test_layout_and_totals(dataset: Path, clips_folder: Path) -> None:
    shards = [f"shards/shard-{k:06d}.{kind}" for k in range(3) for kind in ("json", "tar")]
    ledgers = [f"quarantine/shard-{k:06d}.jsonl" for k in range(3)]
    columns = [f"columns/shard-{k:06d}.parquet" for k in range(3)]
    assert sorted(digests(dataset)) == sorted([*shards, *ledgers, *columns, "dataset.json", "index.parquet"])
    info = json.loads((dataset / "dataset.json").read_text())
    assert (info["samples"], info["quarantined"], info["complete"]) == (9, 3, True)
    assert (info["size"], info["frames"], info["latent_shape"]) == ([32, 48], 6, [6, 4, 4, 6])
    assert info["recipe"]["name"] == "cinemo-tiny"
    assert len(info["bucket_edges"]) == 19
    statistics, index = info["latent_statistics"], DatasetIndex.load(str(dataset))
    loader = LatentLoader(index, global_batch=9, lanes=1, seed=0)
    latents = np.stack([sample.latents_FCHW for sample in loader.batch(0).samples]).astype(np.float64)
    assert statistics["samples"] == 9
    np.testing.assert_allclose(statistics["mean"], latents.mean((0, 1, 3, 4)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics["std"], latents.std((0, 1, 3, 4)), rtol=1e-4)
    lines = [json.loads(line) for ledger in ledgers for line in (dataset / ledger).read_text().splitlines()]
    assert {line["clip_id"]: line["reason"] for line in lines} == {
        "film-1b": "unreadable",
        "film-3b": "unreadable",
        "film-5b": "too_few_frames",
    }
    assert next(line for line in lines if line["clip_id"] == "film-5b")["detail"] == (
        "3 frames, recipe needs 6 (interval 1)"
    )


@pytest.mark.ray
def test_the_sizes_are_those_of_the_plan(
    dataset: Path, clips_folder: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    from cinemo.data.precompute.estimate import plan_only

    real = sum((dataset / f"shards/shard-{k:06d}.tar").stat().st_size for k in range(3))
    plan = plan_only(small_recipe, str(clips_folder), str(tmp_path))
    assert plan["figures"]["bytes"]["value"] == pytest.approx(real, rel=0.1)


@pytest.mark.ray
def test_trainer_reads_every_sample(dataset: Path) -> None:
    loader = LatentLoader(DatasetIndex.load(str(dataset)), global_batch=3, lanes=1, seed=0)
    samples = [sample for step in range(3) for sample in loader.batch(step).samples]
    assert sorted(sample.clip_id for sample in samples) == [f"film-{k}" for k in range(9)]
    assert {sample.caption for sample in samples} >= {"a caption from a sidecar", "film 0"}
    assert all(sample.latents_FCHW.shape == (6, 4, 4, 6) and -1 < sample.ssim < 1 for sample in samples)


@pytest.mark.ray
def test_running_again_changes_nothing(dataset: Path, clips_folder: Path, small_recipe: Recipe) -> None:
    before = stamps(dataset)
    assert run(small_recipe, str(clips_folder), str(dataset))["done"] == 0
    assert stamps(dataset) == before


@pytest.mark.ray
def test_new_bucket_edges_need_no_new_shards(
    dataset: Path, clips_folder: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    edges = [round(0.05 + k * 0.05, 3) for k in range(18)] + [0.97]
    assert run(override(small_recipe, [f"data.bucket_edges={edges}"]), str(clips_folder), str(copy))["done"] == 0
    assert json.loads((copy / "dataset.json").read_text())["bucket_edges"] == edges
    changed = {name for name, digest in digests(copy).items() if digests(dataset)[name] != digest}
    assert changed == {"dataset.json"}


@pytest.mark.ray
def test_one_process_for_all_stages_makes_the_same_bytes(
    dataset: Path, clips_folder: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = override(small_recipe, ["data.encode_actors=0"])
    assert recipe.data.together
    assert not small_recipe.data.together
    summary = run(recipe, str(clips_folder), str(tmp_path / "out"))
    assert summary["stage_seconds"]["encode"] > 0
    now, before = digests(tmp_path / "out"), digests(dataset)
    assert {name for name in before if now.get(name) != before[name]} == {"dataset.json"}  # it holds the recipe


@pytest.mark.ray
def test_lost_records_and_half_written_shards_are_made_again(
    dataset: Path, clips_folder: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    (copy / "shards/shard-000000.json").unlink()
    (copy / "shards/shard-000000.tar").write_bytes(b"half a shard")
    (copy / "shards/shard-000002.tar").unlink()
    (copy / "shards/.shard-000002.tar.abc.partial").write_bytes(b"what a killed process leaves")
    assert run(small_recipe, str(clips_folder), str(copy))["done"] == 8
    assert digests(copy) == digests(dataset)


@pytest.mark.ray
@pytest.mark.parametrize("victims", [["worker"], pytest.param(["worker", "raylet"], marks=pytest.mark.release)])
def test_killed_run_goes_on_to_the_same_bytes(
    dataset: Path, clips_folder: Path, small_recipe: Recipe, tmp_path: Path, victims: list[str]
) -> None:
    """`make chaos` does this for longer, at moments that are drawn."""
    recipe, output = tmp_path / "recipe.json", tmp_path / "killed"
    recipe.write_text(small_recipe.to_json())
    command = [
        sys.executable, str(ROOT / "pipelines/precompute.py"), "--recipe", str(recipe), "--manifest", str(clips_folder),
        "--output", str(output),
    ]  # fmt: skip
    code, killed = chaos.run_and_kill(command, output, [chaos.Kill("everything", True, 0.0)])
    assert killed == 1
    assert code == -signal.SIGKILL
    assert json.loads((output / "dataset.json").read_text())["complete"] is False
    assert (output / ".lock.json").exists()
    with pytest.raises(InputError, match="not complete"):
        DatasetIndex.load(str(output))
    kills = [chaos.Kill(victim, True, 0.0) for victim in victims]
    assert list(chaos.disturb([command] * 4, output, [kills]))[-1].endswith("exit 0")
    assert digests(output) == digests(dataset)


@pytest.mark.release
@pytest.mark.ray
def test_the_first_shard_is_committed_long_before_the_last_clip_is_decoded(
    clips_folder: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    """Also where decoding could use every core: a run killed after hours must have something to go on from."""
    row = {"uri": str(clips_folder / "film 0.mp4"), "caption": "a film"}
    rows = [json.dumps(row | {"clip_id": f"clip-{k}"}) for k in range(1000)]  # minutes of work
    (tmp_path / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    changes = ["data.clips_per_shard=2", "data.views=8", "data.size=[256,384]", "data.encode_actors=2"]
    (tmp_path / "recipe.json").write_text(override(small_recipe, changes).to_json())
    words = [
        "--recipe",
        tmp_path / "recipe.json",
        "--manifest",
        tmp_path / "manifest.jsonl",
        "--output",
        tmp_path / "o",
    ]
    command = [sys.executable, str(ROOT / "pipelines/precompute.py"), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("o/shards/*.json")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert list(tmp_path.glob("o/shards/*.json"))
    assert json.loads((tmp_path / "o/dataset.json").read_text())["complete"] is False


@pytest.mark.ray
def test_what_nobody_foresaw_in_a_worker_is_named(ray_session: None) -> None:
    def fail(rows: pa.Table) -> pa.Table:
        raise IndexError("list index out of range")

    graph = ray.data.from_items([1]).map_batches(fail, batch_format="pyarrow")
    with pytest.raises(RuntimeError, match=r"^in a worker: IndexError: list index out of range$"):
        list(cluster.results(graph))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.seed=5", "seed is 0 there and 5 here"),
        ("data.size=[32,56]", r"size is \[32, 48\] there and \[32, 56\] here"),
        ("data.clips_per_shard=5", "clips_per_shard is 4 there and 5 here"),
    ],
)
def test_another_recipe_is_refused(
    dataset: Path, clips_folder: Path, small_recipe: Recipe, change: str, message: str
) -> None:
    before = stamps(dataset)
    with pytest.raises(InputError, match=message):
        run(override(small_recipe, [change]), str(clips_folder), str(dataset))
    with pytest.raises(InputError, match="clips is 12 there and 3 here"):
        run(small_recipe, str(clips_folder), str(dataset), limit=3)
    assert stamps(dataset) == before


@pytest.mark.ray
def test_mended_clips_are_appended(clips_folder: Path, small_recipe: Recipe, dataset: Path, tmp_path: Path) -> None:
    output = shutil.copytree(dataset, tmp_path / "out")
    with pytest.raises(InputError, match="no clip was refused for that; reasons found: too_few_frames, unreadable"):
        run(small_recipe, str(clips_folder), str(output), retry_quarantine="missing")

    broken = clips_folder / "film 1b.mp4"
    content = broken.read_bytes()
    write_video(broken, film("mended", 30), 25)
    try:
        summary = run(small_recipe, str(clips_folder), str(output), retry_quarantine="unreadable")
    finally:
        broken.write_bytes(content)
    assert (summary["samples"], summary["quarantined"], summary["done"]) == (10, 2, 2)
    assert summary["reasons"] == {"too_few_frames": 1, "unreadable": 1}
    info = json.loads((output / "dataset.json").read_text())
    assert (info["samples"], info["quarantined"], info["complete"]) == (10, 2, True)
    record = json.loads((output / "shards/shard-000003.json").read_text())
    assert record["retry_of"] == {"film-1b": {"shard": 0, "reason": "unreadable"}}
    still = [refusal.clip_id for shard in range(3) for refusal in read_ledger(str(output), shard)]
    assert still == ["film-3b", "film-5b"]
    now, before = digests(output), digests(dataset)
    assert {name for name in before if now.get(name) != before[name]} == {
        "dataset.json", "index.parquet", "quarantine/shard-000000.jsonl",
    }  # fmt: skip

    loader = LatentLoader(DatasetIndex.load(str(output)), global_batch=10, lanes=1, seed=0)
    assert len({sample.key for sample in loader.batch(0).samples}) == 10
    assert run(small_recipe, str(clips_folder), str(output))["done"] == 0
    assert digests(output) == now


@pytest.mark.ray
def test_a_longer_manifest_is_appended(
    clips_folder: Path, small_recipe: Recipe, ray_session: None, tmp_path: Path
) -> None:
    """`test_append.py` has the kills."""
    paths, output = sorted(clips_folder.glob("film ?*.mp4")), str(tmp_path / "out")

    def manifest(count: int) -> str:
        rows = [{"clip_id": path.stem.replace(" ", "-"), "uri": str(path), "caption": ""} for path in paths[:count]]
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "m.jsonl")

    run(small_recipe, manifest(5), output)
    before = digests(tmp_path / "out")
    with pytest.raises(InputError, match="--append the manifest's new clips"):
        run(small_recipe, manifest(12), output)
    summary = run(small_recipe, manifest(12), output, append="skip")
    assert (summary["clips"], summary["samples"], summary["quarantined"], summary["done"]) == (12, 9, 3, 7)
    now = digests(tmp_path / "out")
    assert {name for name in before if now[name] != before[name]} == {"dataset.json", "index.parquet"}
    assert DatasetIndex.load(output).shards == [0, 1, 2, 3]
    assert run(small_recipe, manifest(12), output)["done"] == 0
    assert verify(output, small_recipe, 3)["canary"]["equal"] == 3
    assert digests(tmp_path / "out") == now


@pytest.mark.ray
def test_too_many_refused_clips_stop_the_run(
    clips_folder: Path, small_recipe: Recipe, ray_session: None, tmp_path: Path
) -> None:
    strict = override(small_recipe, ["data.max_quarantine_share=0.2"])
    with pytest.raises(RunError, match=r"of 12 clips are refused \(unreadable 2, too_few_frames 1\), more than"):
        run(strict, str(clips_folder), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out/dataset.json").read_text())["complete"] is False


@pytest.mark.ray
@pytest.mark.s3
def test_on_s3(dataset: Path, clips_folder: Path, small_recipe: Recipe, s3_endpoint: str) -> None:
    manifest = [
        {"clip_id": path.stem.replace(" ", "-"), "uri": path.name, "caption": path.stem}
        for path in sorted(clips_folder.glob("film ?.mp4"))
    ]
    for row in manifest[:5]:
        storage.write_bytes(f"s3://cinemo-test/clips/{row['uri']}", (clips_folder / row["uri"]).read_bytes())
    text = "".join(json.dumps(row) + "\n" for row in [*manifest[:5], {"clip_id": "x", "uri": "x.mp4", "caption": ""}])
    storage.write_bytes("s3://cinemo-test/clips/m.jsonl", text.encode())
    summary = run(small_recipe, "s3://cinemo-test/clips/m.jsonl", "s3://cinemo-test/made")
    assert (summary["samples"], summary["reasons"]) == (5, {"missing": 1})
    remote = LatentLoader(DatasetIndex.load("s3://cinemo-test/made"), global_batch=5, lanes=1, seed=0).batch(0)
    local = LatentLoader(DatasetIndex.load(str(dataset)), global_batch=9, lanes=1, seed=0).batch(0)
    expected = {sample.clip_id: sample.latents_FCHW for sample in local.samples}
    for sample in remote.samples:
        np.testing.assert_array_equal(sample.latents_FCHW, expected[sample.clip_id])


def test_decoders_and_encoders_take_the_nodes_that_are_theirs(
    small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe_of(*changes: str) -> Recipe:
        return override(small_recipe, ["data.encode_actors=0", *changes])

    def found(have: dict[str, float], *changes: str, wait: bool = True) -> pools.Pools:
        monkeypatch.setattr(pools.ray, "cluster_resources", lambda: have)
        recipe = recipe_of(*changes)
        if wait:
            pools.wait_for_nodes(recipe)
        return pools.pools(recipe)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nodes = {"CPU": 192.0, "GPU": 8.0, "decode": 128.0}
    separate = found(nodes, "data.encode_gpus=1", "data.decode_resource=decode", "data.decode_cpus=2")
    assert (separate.decoders, separate.encoders) == (64, 8)
    assert separate.decode["resources"] == {"decode": 2.0}
    assert (separate.encode["num_cpus"], separate.encode["num_gpus"]) == (1.0, 1.0)
    assert found(nodes, "data.encode_gpus=0.5").encoders == 16
    assert found(nodes, "data.encode_gpus=1", "data.encode_actors=3").encoders == 3
    assert separate.decode["compute"].size is None, "Ray Data starts as many as there are cores at the time"
    assert (separate.encode["compute"].min_size, separate.encode["compute"].max_size) == (8, 8)
    monkeypatch.setenv("RAY_ADDRESS", "some:6379")
    growing = found(nodes, "data.encode_gpus=1", "data.decode_tasks=40")
    assert growing.encode["compute"].max_size == float("inf"), "accelerators may be added"
    assert (growing.decoders, growing.decode["compute"].size) == (40, 40)
    limited = found(nodes, "data.encode_gpus=1", "data.encode_actors=12", wait=False)
    assert (limited.encode["compute"].min_size, limited.encode["compute"].max_size) == (8, 12)
    monkeypatch.delenv("RAY_ADDRESS")

    mixed = nodes | {"encode": 4.0}
    theirs = found(mixed, "data.encode_gpus=1", "data.encode_resource=encode")
    assert (theirs.encoders, theirs.encode["num_gpus"], theirs.encode["resources"]) == (4, 1.0, {"encode": 1.0})
    on_cpus = found({"CPU": 16.0, "encode": 2.0}, "data.encode_resource=encode")
    assert on_cpus.encoders == 2
    assert not recipe_of("data.encode_resource=encode").data.together

    laptop = found({"CPU": 2.0})
    assert (laptop.decoders, laptop.capacity) == (2, {"decode": 2, "encode": 2})
    apart = found({"CPU": 2.0}, "data.encode_actors=2")
    assert apart.encode["compute"].max_size == 2
    assert 2 * apart.decode["num_cpus"] + apart.encode["num_cpus"] <= 2, "an encoder must fit beside them"
    with pytest.raises(InputError, match=r"of which the cluster has 0 decode; --set data.decode_resource=null"):
        found({"CPU": 2.0}, "data.decode_resource=decode")
    with pytest.raises(InputError, match=r"of which the cluster has 0 encode; --set data.encode_resource=null"):
        found({"CPU": 2.0}, "data.encode_resource=encode")
    with pytest.raises(InputError, match=r"for 1 encoder, but the cluster has 0 accelerators; --set"):
        found({"CPU": 2.0}, "data.encode_gpus=1")


def objects(prefix: str) -> dict[str, str]:
    """sha256 of every object under ``s3://cinemo-test/PREFIX/``."""
    client = boto3.client("s3")
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="cinemo-test", Prefix=f"{prefix}/")["Contents"]]
    return {
        key.removeprefix(f"{prefix}/"): hashlib.sha256(
            client.get_object(Bucket="cinemo-test", Key=key)["Body"].read()
        ).hexdigest()
        for key in keys
    }


@pytest.mark.ray
@pytest.mark.s3
def test_s3_that_fails_gives_the_same_bytes_and_an_outage_blames_no_clip(
    ray_session: None, clips_folder: Path, small_recipe: Recipe, s3_faults: FaultyS3, tmp_path: Path
) -> None:
    paths = sorted(clips_folder.glob("film ?*.mp4"))
    for path in paths:
        storage.write_bytes(f"s3://cinemo-test/faulty/{path.name}", path.read_bytes())
    rows = [{"clip_id": path.stem.replace(" ", "-"), "uri": path.name, "caption": ""} for path in paths]
    manifest = "s3://cinemo-test/faulty/m.jsonl"
    storage.write_bytes(manifest, "".join(json.dumps(row) + "\n" for row in rows).encode())
    run(small_recipe, manifest, str(tmp_path / "quiet"))
    quiet = digests(tmp_path / "quiet")

    s3_faults.meet({"503": 1.0}, only="film%207.mp4")
    with pytest.raises(RunError, match=r"s3://cinemo-test/faulty/film 7.mp4: storage has been failing for"):
        run(small_recipe, manifest, "s3://cinemo-test/made-among-faults")
    assert storage.read_json("s3://cinemo-test/made-among-faults/dataset.json")["complete"] is False

    s3_faults.meet(dict.fromkeys(FAULTS, 0.03), seed=3, delay=0.1)
    summary = run(small_recipe, manifest, "s3://cinemo-test/made-among-faults")
    assert summary["reasons"] == {"too_few_frames": 1, "unreadable": 2}
    assert len(s3_faults.injected) >= 4, s3_faults.injected
    s3_faults.meet()
    assert objects("made-among-faults") == quiet
    assert not boto3.client("s3").list_multipart_uploads(Bucket="cinemo-test").get("Uploads")


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        ("s3://nowhere-at-all/out", 2, "bucket does not exist"),
        ("s3://cinemo-test/dead", 1, "storage has been failing for"),
    ],
)
def test_storage_that_is_not_there_ends_in_one_line(
    clips_folder: Path, s3_endpoint: str, output: str, code: int, message: str
) -> None:
    words = ["--manifest", str(clips_folder), "--output", output]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), s3.PATIENCE: "1"}
    if code == 1:
        environment["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"  # nobody listens there
    ended = subprocess.run(
        [sys.executable, str(ROOT / "pipelines/precompute.py"), *words],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == code
    said = [line for line in ended.stderr.splitlines() if "trying again" not in line]
    assert len(said) == 1
    assert message in said[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--manifest", "nowhere.csv", "--output", "out"], "nowhere.csv: no such file"),
        (["--manifest", ".", "--output", "out"], "no videos there"),
        (["--manifest", "m.csv", "--output", "out", "--set", "data.sise=1"], "unknown key 'data.sise'"),
        (["--output", "out"], "required: --manifest"),
        (["--manifest", ".", "--output", "out", "--prices", "p.json"], "--prices only works with --plan"),
        (["--manifest", ".", "--output", "out", "--plan", "--prices", "p.json"], "prices p.json: no such file"),
    ],
)
def test_command_refuses_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "pipelines/precompute.py"))["main"]
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_no_vae_is_refused_before_anything_is_done(
    clips_folder: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(InputError, match=r"config\.json is for UNet2DModel, expected AutoencoderKL"):
        run(override(small_recipe, [f"encoders.vae={tmp_path}"]), str(clips_folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
