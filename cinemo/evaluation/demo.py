"""The demo: the whole chain on one machine through its own entry points, ending in one page that shows it.

clips -> precompute -> train -> export -> animate -> serve -> report, each timed, each reused where nothing changed.
"""

from __future__ import annotations

import csv
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from cinemo import storage, tracking
from cinemo.animate import AnimateRequest, animate, load_image
from cinemo.bundle import load_bundle, read_card, save_bundle
from cinemo.config import MOTION_BUCKETS, Recipe
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import LatentLoader
from cinemo.data.manifest.manifest import read_manifest
from cinemo.diagnostics import errors
from cinemo.evaluation.dataset_report import equal_population_edges
from cinemo.evaluation.figures import animated_sheet, contact_sheet
from cinemo.evaluation.next_steps import closing_lines
from cinemo.evaluation.rendered import explained_samples, measure_motion
from cinemo.evaluation.report import DemoFacts, Sample, write_demo_report
from cinemo.evaluation.stages import Stages, running
from cinemo.media.gif import write_gif
from cinemo.media.motion import motion_bucket
from cinemo.media.saving import save_animation
from cinemo.media.sources import fetched
from cinemo.media.synthetic import CLIP_FRAMES, render_clips, render_scene
from cinemo.media.video import read_frames
from cinemo.methods import at_motion, build_method, method_class
from cinemo.progress import clock, counted, doing, say
from cinemo.recipes import DEFAULT_RECIPE, load_recipe
from cinemo.types import ClipError, InputError, RunError

IMAGES = 3
SAMPLES = 200  # about what a dataset of the demo holds: views per clip follow from it
_STEPS = 25  # DDIM steps of the demo's videos: half the published number looks the same here and takes half the time
_QUANTILES = (0.05, 0.95)
_READY_SECONDS, _JOB_SECONDS = 240.0, 240.0
# Rendered scenes whose first frames are animated; their seed is neither that of the clips nor of the test scenes.
_UNSEEN_SEED, _UNSEEN = 1004, ("object", "pan", "flow")
_SHOWN = (0, 7, 14)  # levels of motion of the shipped base's videos, which the README shows
_GIVEN = 24  # samples of the dataset that they are measured on
_QUALITIES = 2  # pictures on which less work is compared with the full number of steps
_MEASURED = 4  # unseen clips of each kind that both models are measured on


@dataclass(frozen=True)
class DemoSettings:
    """``recipe``: its name. ``clips``: a folder of videos to use instead of ``count`` rendered ones. ``max_steps``: of
    the training."""

    recipe: str
    clips: str | None
    count: int
    max_steps: int
    seed: int = 0


@dataclass(frozen=True)
class _Picture:
    name: str
    prompt: str
    path: Path


def run_demo(output: Path, scripts: Path, settings: DemoSettings, fresh: bool = False) -> None:
    """Run what is missing of the demo in ``output`` and write ``report.html``.

    Raises:
        InputError: ``output`` or ``clips`` cannot be used.
        SystemExit: a stage failed, with its exit code.
    """
    begun = time.monotonic()
    table = read_manifest(settings.clips, names_as_captions=True).read() if settings.clips else None
    stages = Stages(output, scripts, fresh)
    dataset, run, bundle = output / "dataset", output / "run", output / "bundle"

    manifest = settings.clips or str(output / "clips" / "manifest.jsonl")
    if table is None:
        inputs: Any = [settings.count, settings.seed]
        stages.run("render", inputs, ["clips"], lambda: _render(output / "clips", settings))
        clips = settings.count
    else:
        inputs, clips = [[row["uri"], _stamp(row["uri"])] for row in table.to_pylist()], len(table)

    named = () if settings.recipe == DEFAULT_RECIPE else ("--recipe", settings.recipe)
    views = min(16, max(2, round(SAMPLES / clips)))
    words = stages.note(
        "precompute", "precompute", *named, "--manifest", manifest, "--output", dataset, "--limit", SAMPLES,
        "--set", f"data.views={views}", *(["--file-names-as-captions"] if settings.clips else []),
    )  # fmt: skip
    stages.run("precompute", [inputs, words[3:]], ["dataset"], lambda: stages.command("precompute", words))
    index = DatasetIndex.load(str(dataset))

    # Buckets are those of rendered clips; others fill them by their own scores.
    edges = index.info["bucket_edges"] if table is None else equal_population_edges(index.ssim_histogram)
    own_edges = () if table is None else ("--set", f"data.bucket_edges={json.dumps(edges)}")
    train = stages.note(
        "train", "train", *named, "--data", dataset, "--output", run, "--max-steps", settings.max_steps,
        "--set", f"train.seed={settings.seed}", "--set", "train.sample_every=0", *own_edges,
    )  # fmt: skip
    stages.run("train", train[3:], ["run"], lambda: stages.command("train", train))
    export = stages.note("export", "export", "--checkpoint", run, "--output", bundle)
    stages.run("export", [], ["bundle"], lambda: stages.command("export", export))

    recipe = read_card(bundle).recipe
    asked = _levels(recipe, motion_buckets(index, edges))
    pictures = _pictures(output / "images", table, recipe.data.size)
    first = pictures[0]
    video = output / "videos" / _video_name(first, asked[0])
    words_animate = stages.note(
        "animate", "animate", "--bundle", bundle, "--image", first.path, "--prompt", first.prompt,
        *(part for name, value in asked[0].items() for part in (f"--{name.replace('_', '-')}", value)),
        "--steps", _STEPS, "--seed", settings.seed, "--output", video,
    )  # fmt: skip

    def make_videos() -> None:
        stages.command("animate", words_animate)
        _animate_rest(bundle, pictures, asked, settings.seed, output / "videos")

    shown = [picture.prompt for picture in pictures]
    stages.run("animate", [shown, asked, _STEPS, settings.seed], ["videos"], make_videos)

    base, measured = output / "base", output / "motion.json"
    stages.run(
        "measure",
        [_MEASURED, settings.recipe],
        ["motion.json", "base"],
        lambda: _measure(settings.recipe, base, bundle, index, measured),
    )

    words_quality = stages.note(
        "quality", "evaluate", "--bundle", bundle, "--quality", _QUALITIES, "--output", output / "quality",
        "--into-bundle",
    )  # fmt: skip
    stages.run("quality", [_QUALITIES], ["quality"], lambda: stages.command("quality", words_quality))

    def show_base() -> None:
        levels = _levels(recipe, _SHOWN)
        _animate_rest(base, pictures, levels, settings.seed, output / "base-videos")
        _animated(output / "animation.gif", output / "base-videos", pictures, levels, recipe)

    stages.run("base videos", [shown, _SHOWN], ["base-videos", "animation.gif"], show_base)

    port = _free_port()
    serve = stages.note("serve", "serve", "--bundle", bundle, "--port", port, "--state", output / "serve")
    served = output / "served"
    stages.run(
        "serve",
        first.prompt,
        ["served", "serve"],
        lambda: _serve(serve, port, first, asked[-1], served, stages),
    )

    with doing("drawing the report"):
        _report(output, stages, index, pictures, asked)
    say(f"\ndone in {clock(time.monotonic() - begun)}")
    for line in closing_lines(output, scripts, first.path, first.prompt, asked[-1]):
        say(line)


def _levels(recipe: Recipe, buckets: Sequence[int]) -> list[dict[str, Any]]:
    """Controls for little, medium and much motion; one empty set of a method that has no control of it."""
    levels = [at_motion(recipe, bucket) for bucket in buckets]
    return [controls for place, controls in enumerate(levels) if controls not in levels[:place]]


def _said(controls: Mapping[str, Any]) -> str:
    """``motion bucket 3``: controls for people."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in controls.items())


def _animated(
    target: Path, videos: Path, pictures: Sequence[_Picture], levels: Sequence[Mapping[str, Any]], recipe: Recipe
) -> None:
    """The README's moving picture: every picture at every level."""
    frames = range(recipe.data.frames)
    rows = [[read_frames(videos / _video_name(picture, level), frames) for level in levels] for picture in pictures]
    sheet = animated_sheet(rows, [_said(level) for level in levels], [picture.prompt for picture in pictures])
    write_gif(target, sheet, recipe.sample.fps)


def _video_name(picture: _Picture, controls: Mapping[str, Any]) -> str:
    parts = [picture.name, *(f"{name.replace('_', '-')}-{value:02g}" for name, value in controls.items())]
    return "-".join(parts) + ".mp4"


def _measure(name: str, base: Path, tuned: Path, index: DatasetIndex, target: Path) -> None:
    """Does what they make move as asked? Of the shipped weights, and of what this training made of them; on unseen
    rendered scenes and, as ``given``, on samples of the dataset."""
    recipe = load_recipe(name)
    assert recipe.train.init is not None
    method, init = method_class(recipe), recipe.train.init
    networks = {part: method.load_network(recipe, part, init, torch.float32, base=True) for part in method.parts}
    save_bundle(base, recipe, networks, {"weights": "that ship with the package"})
    loader = LatentLoader(index, global_batch=_GIVEN, lanes=1, seed=0)
    samples, figures = loader.batch(0).samples, {}
    for name, place in (("base", base), ("tuned", tuned)):
        say({"base": "the weights that the training began with:", "tuned": "what the training made of them:"}[name])
        bundle = load_bundle(place)
        # The shipped weights learnt from frames that were never in a file.
        figures[name] = measure_motion(bundle, _MEASURED, say=say, as_files=name == "tuned")
        figures[name]["given"] = explained_samples(bundle, samples)
    storage.write_json(str(target), figures)


def motion_buckets(index: DatasetIndex, edges: Sequence[float]) -> list[int]:
    """Three different buckets at equal distances: little, medium and much motion as the dataset has it."""
    histogram = index.ssim_histogram
    shares = np.cumsum(histogram) / histogram.sum()
    middles = [(int(np.searchsorted(shares, 1 - share)) + 0.5) / len(histogram) for share in _QUANTILES]
    low, high = (motion_bucket(ssim, edges) for ssim in middles)
    low = min(low, MOTION_BUCKETS - 3)
    high = max(high, low + 2)
    return [low, (low + high) // 2, high]


def _render(directory: Path, settings: DemoSettings) -> None:
    """Clips, and two files that are none, so that the quarantine has something to show."""
    say(f"{settings.count} clips in {directory}")
    manifest = render_clips(directory, settings.count, settings.seed)
    first = sorted(directory.glob("*.mp4"))[0]
    (directory / "cut.mp4").write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    (directory / "text.mp4").write_text("not a video\n")
    rows = [{"clip_id": name, "uri": f"{name}.mp4", "caption": "broken on purpose"} for name in ("cut", "text")]
    storage.write_bytes(str(manifest), manifest.read_bytes() + "".join(json.dumps(r) + "\n" for r in rows).encode())


def _stamp(uri: str) -> int:
    return storage.size(uri) if storage.exists(uri) else 0


def _pictures(directory: Path, table: Any, size: tuple[int, int]) -> list[_Picture]:
    """The images to animate: first frames of unseen rendered clips, or of three of the given ones (saved at twice the
    model's size, because the published image preparation scales without antialiasing)."""
    found: list[tuple[str, str, np.ndarray]] = []
    if table is None:
        for number, kind in enumerate(_UNSEEN):
            scene = render_scene(_UNSEEN_SEED, number, kind=kind)
            # How fast is for the motion bucket to say.
            found.append((f"unseen-{kind}", scene.without_speed(), scene.draw(CLIP_FRAMES / 4)))
    else:
        rows = table.to_pylist()
        first_choice = np.linspace(0, len(rows) - 1, IMAGES).round().astype(int).tolist()
        spread = dict.fromkeys([*first_choice, *range(len(rows))])
        for row in (rows[place] for place in spread):
            try:
                with fetched(row["uri"]) as path:
                    frame = read_frames(path, [0], (2 * size[0], 2 * size[1]))[0]
            except ClipError:
                continue
            found.append((row["clip_id"], row["caption"], frame))
            if len(found) == IMAGES:
                break
    if not found:
        raise InputError("--clips: no video there could be read")
    directory.mkdir(exist_ok=True)
    pictures = []
    for name, prompt, frame in found:
        Image.fromarray(frame).save(directory / f"{name}.png")
        pictures.append(_Picture(name, prompt, directory / f"{name}.png"))
    return pictures


def _animate_rest(
    bundle: Path, pictures: Sequence[_Picture], levels: Sequence[Mapping[str, Any]], seed: int, videos: Path
) -> None:
    """Every other video, with the bundle loaded once: what ``animate.py`` does, without its start-up."""
    loaded = load_bundle(bundle)
    videos.mkdir(exist_ok=True)
    asked = [(picture, controls) for picture in pictures for controls in levels]
    for picture, controls in counted("animating", asked, len(asked), "videos"):
        path = videos / _video_name(picture, controls)
        if path.exists():
            continue
        request = AnimateRequest(load_image(picture.path), picture.prompt, steps=_STEPS, seed=seed, **controls)
        save_animation(path, animate(loaded, request))
        say(str(path))


def _serve(
    words: Sequence[str],
    port: int,
    picture: _Picture,
    controls: Mapping[str, Any],
    target: Path,
    stages: Stages,
) -> None:
    """Start the server, ask it once as a client would, stop it; ``target`` gets the video and what was said."""
    log = stages.directory / "logs" / "serve.log"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    begun = time.monotonic()
    with (
        log.open("w") as file,
        running(words, stdout=file) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        with doing("starting the server"):
            _wait_ready(client, process, log)
        ready = time.monotonic() - begun
        say(f"the server is ready after {clock(ready)}")
        form = {"prompt": picture.prompt, "num_inference_steps": str(_STEPS), "seed": "1"}
        form |= {name: str(value) for name, value in controls.items()}
        answer = client.post("/v1/videos", data=form, files={"input_reference": picture.path.read_bytes()})
        asked = time.monotonic()
        video = answer.raise_for_status().json()
        with doing("animating over HTTP") as work:
            while video["status"] in ("queued", "in_progress"):
                if time.monotonic() - asked > _JOB_SECONDS:
                    raise RunError(f"serve: job {video['id']} took longer than {_JOB_SECONDS:.0f} s; see {log}")
                time.sleep(1)
                video = client.get(f"/v1/videos/{video['id']}").raise_for_status().json()
                work.what = f"animating over HTTP, {video['progress']} %"
        if video["status"] != "completed":
            raise RunError(f"serve: job {video['id']} {video['status']}: {video['error']}; see {log}")
        took = time.monotonic() - asked
        content = client.get(f"/v1/videos/{video['id']}/content").raise_for_status().content
        say(f"a video came over HTTP after {clock(took)}")
        process.send_signal(signal.SIGINT)
        with doing("stopping the server"):
            code = process.wait(timeout=90)
    if code:
        raise RunError(f"serve: ended with exit code {code} after SIGINT; see {log}")
    (target / "video.mp4").write_bytes(content)
    told = {name: video[name] for name in ("prompt", *controls, "seed", "size", "seconds", "id")}
    times = {"server ready after": f"{ready:.0f} s", "video ready after": f"{took:.1f} s"}
    (target / "video.json").write_text(json.dumps(told | times, indent=2) + "\n")


def _wait_ready(client: httpx.Client, process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            print(*log.read_text().splitlines()[-15:], f"the server did not start; see {log}", sep="\n", file=errors())
            raise SystemExit(process.returncode)
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RunError(f"serve: not ready after {_READY_SECONDS:.0f} s; see {log}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _report(
    output: Path,
    stages: Stages,
    index: DatasetIndex,
    pictures: Sequence[_Picture],
    levels: Sequence[Mapping[str, Any]],
) -> None:
    card = read_card(output / "bundle")
    samples, frames, labels = [], [], []
    for picture in pictures:
        for controls in levels:
            path = output / "videos" / _video_name(picture, controls)
            samples.append(Sample(load_image(picture.path), picture.prompt, _said(controls), path.read_bytes()))
            frames.append(read_frames(path, range(card.recipe.data.frames)))
            labels.append(f"{_said(controls)}: {picture.prompt}".removeprefix(": "))
    sheet = contact_sheet(frames, labels)
    sheet.save(output / "contact_sheet.png")
    with (output / "run" / "loss.csv").open() as file:
        losses = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_method(card.recipe).parameters())
    facts = DemoFacts(
        motion=storage.read_json(str(output / "motion.json")),
        dataset=index,
        edges=card.motion.edges,
        losses=losses,
        samples=samples,
        sheet=sheet,
        served=(output / "served" / "video.mp4").read_bytes(),
        serving=storage.read_json(str(output / "served" / "video.json")),
        seconds=stages.seconds,
        bundle=card.digest,
        parameters=parameters,
        commands=stages.commands,
        mlflow=tracking.locate(str(output / "run"))[2],
    )
    write_demo_report(str(output / "report.html"), facts)
