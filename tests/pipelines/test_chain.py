"""The whole tiny chain through its entry points: on a bare machine, and the same commands under `ray job submit`."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import ray_nodes
from hearing import listen
from ray_nodes import Nodes

from cinemo import cli
from cinemo.evaluation.metrics.frames import psnr
from cinemo.media.mp4 import read_metadata
from cinemo.media.synthetic import render_clips
from cinemo.media.transforms import prepare_image
from cinemo.media.video import probe, read_frames
from cinemo.training.checkpoint import checkpoints
from cinemo.training.report import sample_log

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

# Small enough for seconds, large enough that every stage does its real work.
PRECOMPUTE = ["--set", "data.clips_per_shard=4"]
TRAIN = [
    "--max-steps", "4", "--set", "train.global_batch=4", "--set", "train.micro_batch=2",
    "--set", "train.checkpoint_every=2", "--set", "train.log_every=1", "--set", "sample.steps=4",
]  # fmt: skip

SILENCE = 30.0  # seconds; a command speaks every 5, where the machine has a core for it

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def command(script: str, *arguments: str | Path, code: int = 0) -> str:
    """Run an entry point as a user would, who is never left waiting in silence; returns its output."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    heard = listen([sys.executable, f"pipelines/{script}.py", *arguments], ROOT, environment, 400)
    assert heard.code == code, f"{script} ended with {heard.code}\n{heard.text[-10000:]}"
    assert not heard.stray(), heard.text
    silent, after = heard.longest_silence()
    assert silent < SILENCE, f"{script} said nothing for {silent:.0f} s after {after!r}\n{heard.text}"
    return heard.text


def main_of(script: str, capfd: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> str:
    """The same in this process, which has the libraries already; its output."""
    capfd.readouterr()
    entry = importlib.import_module(f"pipelines.{script}").main
    try:
        cli.run(entry, [str(argument) for argument in arguments])
        ended = 0
    except SystemExit as error:
        ended = int(error.code or 0)
    output = "".join(capfd.readouterr())
    assert ended == code, f"{script} ended with {ended}\n{output}"
    return output


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rendered clips and two files that are no videos, in one manifest."""
    directory = tmp_path_factory.mktemp("clips")
    manifest = render_clips(directory, count=10, seed=7, size=(72, 104), frames=64)
    (directory / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (directory / "empty.mp4").write_bytes(b"")
    with manifest.open("a") as file:
        for name in ("noise", "empty"):
            file.write(json.dumps({"clip_id": name, "uri": f"{name}.mp4", "caption": "not a video"}) + "\n")
    return manifest


@pytest.fixture(scope="module")
def dataset(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("chain") / "dataset"
    command("precompute", "--manifest", clips, "--output", output, *PRECOMPUTE)
    return output


@pytest.fixture(scope="module")
def run(dataset: Path) -> Path:
    output = dataset.parent / "run"
    command("train", "--data", dataset, "--output", output, *TRAIN)
    return output


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    output = run.parent / "bundle"
    command("export", "--checkpoint", run, "--output", output)
    return output


def shard_digests(dataset: Path) -> dict[str, str]:
    return {p.name: json.loads(p.read_text())["checksum"] for p in sorted((dataset / "shards").glob("*.json"))}


def losses(run: Path) -> list[float]:
    with (run / "loss.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_precompute_stores_or_quarantines_every_clip(dataset: Path) -> None:
    described = json.loads((dataset / "dataset.json").read_text())
    assert (described["samples"], described["quarantined"], described["complete"]) == (10, 2, True)
    refused = [
        json.loads(line) for p in (dataset / "quarantine").glob("*.jsonl") for line in p.read_text().splitlines()
    ]
    assert {entry["clip_id"] for entry in refused} == {"noise", "empty"}
    assert all(entry["stage"] and entry["reason"] and entry["detail"] for entry in refused)
    assert len(shard_digests(dataset)) == 3


def test_train_starts_from_the_shipped_base(run: Path) -> None:
    summary = json.loads((run / "train.json").read_text())
    assert summary["steps"] == 4
    assert len(losses(run)) == 4
    assert max(losses(run)) < 0.6  # from nothing it begins at 1
    assert (run / "mlflow.db").stat().st_size > 0
    assert list((run / "samples").glob("*.png"))


def test_a_finished_run_resumes_to_nothing(dataset: Path, run: Path) -> None:
    before = json.loads((run / "train.json").read_text())
    command("train", "--data", dataset, "--output", run, *TRAIN, "--resume", "auto")
    assert json.loads((run / "train.json").read_text())["steps"] == before["steps"]


def test_animate_writes_a_video_that_says_how_it_was_made(
    bundle: Path, clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import PIL.Image

    image = tmp_path / "first.png"
    first = next(path for path in sorted(clips.parent.glob("*.mp4")) if path.stat().st_size > 6000)
    PIL.Image.fromarray(read_frames(first, [0])[0]).save(image)
    output = tmp_path / "out.mp4"
    arguments = ["--bundle", bundle, "--image", image, "--prompt", "a ball rolls left", "--steps", "3", "--seed", "5"]
    command("animate", *arguments, "--motion-bucket", "3", "--output", output, "--save-latents", tmp_path / "a.npz")
    info = probe(output)
    assert (info.frames, info.height, info.width) == (16, 64, 96)
    metadata = read_metadata(output)
    settings = json.loads(metadata["comment"])
    assert settings["seed"] == 5
    assert settings["motion_bucket"] == 3
    assert json.loads((bundle / "bundle.json").read_text())["digest"] in metadata["comment"]
    again = ["--motion-bucket", "3", "--output", tmp_path / "b.mp4", "--save-latents", tmp_path / "b.npz"]
    main_of("animate", capfd, *arguments, *again)
    first_run, second_run = np.load(tmp_path / "a.npz")["latents"], np.load(tmp_path / "b.npz")["latents"]
    assert first_run.shape == (16, 16, 8, 12)
    np.testing.assert_array_equal(first_run, second_run)


def test_animate_edits_a_video_and_transfers_its_motion(
    bundle: Path, clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The edited first frame stays; where the source moves most, the edited video does too, and not by chance."""
    import PIL.Image

    source, other = moving_clips(clips.parent, 2)
    frames = read_frames(source, range(0, 64, 4))
    edited = frames[0][..., ::-1]  # red and blue change places
    PIL.Image.fromarray(edited).save(tmp_path / "edited.png")
    arguments = ["--bundle", bundle, "--image", tmp_path / "edited.png", "--prompt", "the same in other colours"]
    arguments += ["--source-video", source, "--source-prompt", "coloured shapes", "--source-interval", "4"]
    arguments += ["--no-dct-init", "--steps", "20", "--output", tmp_path / "edited.mp4"]
    main_of("animate", capfd, *arguments)
    settings = json.loads(read_metadata(tmp_path / "edited.mp4")["comment"])
    assert settings["source_prompt"] == "coloured shapes"
    assert settings["guidance_scale"] == 1
    made = read_frames(tmp_path / "edited.mp4", range(16))
    assert psnr(made[0], resized(edited)) > 22
    follows = correlation(change(made), change(np.stack([resized(frame) for frame in frames])))
    chance = correlation(change(made), change(np.stack([resized(f) for f in read_frames(other, range(0, 64, 4))])))
    assert follows > 0.5
    assert follows > chance + 0.2

    message = main_of("animate", capfd, *arguments, "--source-interval", "9", code=2)
    assert "64 frames, recipe cinemo-tiny needs 136 (interval 9)" in message


def moving_clips(directory: Path, count: int) -> list[Path]:
    """The clips that change most between their first and last frame."""
    found = {}
    for path in sorted(directory.glob("*.mp4")):
        if path.stat().st_size > 6000:
            first, last = read_frames(path, [0, 60]).astype(float)
            found[path] = np.abs(first - last).mean()
    return sorted(found, key=lambda path: -found[path])[:count]


def resized(frame: np.ndarray) -> np.ndarray:
    pixels = prepare_image(np.ascontiguousarray(frame), (64, 96)).permute(1, 2, 0).numpy()
    return ((pixels + 1) * 127.5).round().astype(np.uint8)


def change(frames_FHWC: np.ndarray) -> np.ndarray:
    """How far each 4x4 cell of each later frame is from the first frame."""
    luma = frames_FHWC.astype(float).mean(axis=3)
    cells = luma.reshape(len(luma), 16, 4, 24, 4).mean(axis=(2, 4))
    return np.abs(cells[1:] - cells[0])


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("precompute", ["--manifest", "none.jsonl", "--output", "{tmp}/o"], "none.jsonl"),
        ("precompute", ["--manifest", "{tmp}", "--output", "{tmp}/o"], "{tmp}"),
        ("precompute", ["--manifest", "{clips}", "--output", "{clips}/o"], "cannot write"),
        (
            "precompute",
            ["--manifest", "{clips}", "--output", "{tmp}/o", "--set", "data.viewz=1"],
            "did you mean data.views",
        ),
        ("precompute", ["--manifest", "{clips}", "--output", "{tmp}/o", "--recipe", "nope"], "unknown name"),
        ("precompute", ["--output", "{tmp}/o"], "--manifest"),
        ("train", ["--data", "{tmp}/none", "--output", "{tmp}/o"], "none"),
        ("export", ["--checkpoint", "{tmp}/none", "--output", "{tmp}/o"], "none"),
        (
            "animate",
            ["--bundle", "{tmp}/none", "--image", "i", "--prompt", "p", "--output", "{tmp}/o.mp4"],
            "none: no such file",  # the bundle says which flags there are
        ),
        ("evaluate", ["--bundle", "{tmp}/none", "--data", "{tmp}/d", "--output", "{tmp}/e"], "no dataset there"),
        ("serve", ["--bundle", "{tmp}/none"], "none"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    script: str, arguments: list[str], message: str, clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(tmp=tmp_path, clips=clips) for argument in arguments]
    output = main_of(script, capfd, *filled, code=2)
    assert message.format(tmp=tmp_path) in output
    assert "Traceback" not in output
    told = [line for line in output.strip().splitlines() if not line.endswith(" gone")]  # on a slow machine
    assert len(told) == 1, output


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with ray_nodes.nodes() as made:
        yield made


def submit(cluster: Nodes, script: str, *arguments: str | Path, options: Sequence[str] = ()) -> Job:
    """`ray job submit` with some options of its own."""
    command = [BIN / "ray", "job", "submit", "--working-dir", ".", *options]
    command += ["--", "python", f"pipelines/{script}.py", *arguments]
    return Job(list(map(str, command)), cluster.environment | {"PYTHONUNBUFFERED": "1"})


class Job:
    """A submitted job; its output is read as it comes."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        self.said.extend(self.process.stdout)

    def until(self, what: str, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not happened():
            assert self.process.poll() is None, f"ended before {what}: {''.join(self.said)[-8000:]}"
            assert time.monotonic() < deadline, f"{what} did not happen: {''.join(self.said)[-8000:]}"
            time.sleep(0.1)

    def says(self, text: str) -> None:
        self.until(f"it said {text!r}", lambda: any(text in line for line in self.said))

    def succeeds(self) -> None:
        code = self.process.wait(timeout=400)
        self._reader.join(timeout=30)
        assert code == 0, "".join(self.said)[-12000:]


def test_submitted_jobs_do_the_same_on_nodes_that_differ_come_and_go(
    cluster: Nodes, clips: Path, dataset: Path, run: Path, tmp_path: Path
) -> None:
    """Nodes that decode have no accelerator and may be taken; one that has them comes only when it is asked for."""
    first, second = (cluster.add(cpus=1, decode=1) for _ in range(2))
    machines = ["--set", "data.decode_resource=decode", "--set", "data.encode_resource=accelerator"]
    job = submit(cluster, "precompute", "--manifest", clips, "--output", tmp_path / "dataset", *PRECOMPUTE, *machines)
    job.says("waiting for 1 accelerator: data.encode_resource is 'accelerator', of which the cluster has 0")
    accelerator = cluster.add(cpus=2, accelerator=1)

    def decoding() -> bool:  # or the clips are few and it has just been: the job goes on for a while
        done = re.compile(r"[1-9]\d*/12 clips")
        return any("_decode_and_score" in task for task in first.tasks()) or any(map(done.match, job.said))

    job.until("a clip was being decoded", decoding)
    assert not any("_Encoder" in task for node in (first, second) for task in node.tasks())
    first.kill()
    third = cluster.add(cpus=1, decode=1)
    job.succeeds()
    assert shard_digests(tmp_path / "dataset") == shard_digests(dataset)
    assert json.loads((tmp_path / "dataset" / "dataset.json").read_text())["quarantined"] == 2

    machines = ["--set", "train.resource=trainer"]
    job = submit(cluster, "train", "--data", tmp_path / "dataset", "--output", tmp_path / "run", *TRAIN, *machines)
    job.says("waiting for 2 times 1 CPU and 1 trainer, of which the nodes have room for 0")
    accelerator.kill()
    trainer = cluster.add(cpus=2, trainer=2)
    job.until("training", lambda: any("TrainWorker" in task for task in trainer.tasks()))
    for node in (second, third):
        node.kill()
    job.succeeds()
    here, there = (json.loads((path / "train.json").read_text()) for path in (run, tmp_path / "run"))
    assert there["steps"] == here["steps"] == 4
    assert losses(tmp_path / "run") == pytest.approx(losses(run), rel=1e-4)


@pytest.mark.release
def test_a_drained_node_and_a_stopped_job_cost_no_step(cluster: Nodes, dataset: Path, tmp_path: Path) -> None:
    """A spot node is taken away with a notice, and the training that went on elsewhere is ended by `ray job stop`."""
    output, options = tmp_path / "run", ["--submission-id", "on-spot-nodes"]
    options += ["--runtime-env-json", json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}})]
    endless = ["--max-steps", "100000", "--set", "train.checkpoint_every=100000", "--set", "train.workers=1"]
    endless += ["--set", "train.resource=spot", "--set", "train.sample_every=0", "--set", "train.validate_every=0"]

    node = cluster.add(cpus=2, spot=1)
    job = submit(cluster, "train", "--data", dataset, "--output", output, *TRAIN, *endless, options=options)
    job.says("step 1/")
    there = "import ray; ray.init(); print(next(n['NodeID'] for n in ray.nodes() if n['Resources'].get('spot')))"
    address = {"RAY_ADDRESS": f"127.0.0.1:{cluster.gcs}"}
    name = subprocess.check_output([sys.executable, "-c", there], env=cluster.environment | address, text=True).strip()
    drain = [BIN / "ray", "drain-node", "--address", address["RAY_ADDRESS"], "--node-id", name, "--reason-message", "x"]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "90"]
    subprocess.run(drain, env=cluster.environment, check=True, capture_output=True)
    told = time.monotonic()
    job.says(f"node {name} will be taken away in ")
    job.until("a checkpoint was complete", lambda: bool(checkpoints.complete(str(output))))
    assert time.monotonic() - told < 60
    saved = checkpoints.complete(str(output))[-1].step
    cluster.add(cpus=2, spot=1)
    node.kill()
    job.says(f"continuing at step {saved}")

    job.says(f"step {saved + 2}/")
    stopped = subprocess.run(
        [BIN / "ray", "job", "stop", "on-spot-nodes"], env=cluster.environment, capture_output=True, text=True
    )
    assert "was stopped" in stopped.stdout, f"{stopped.stdout}\n{stopped.stderr}"
    last = checkpoints.complete(str(output))[-1].step
    job.says(f"ended at step {last}, which is saved (SIGTERM)")
    assert last >= saved + 2
    assert list(sample_log.read(str(output))) == list(range(last))
