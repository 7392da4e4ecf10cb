"""The commands of the how-to pages, and of the pages on clusters and servers, run as they stand, at toy size.

What they name is there. A recipe is the real one with small networks, whose weights, random ones, lie where it looks
for them; clips and the photo are rendered; ``s3://`` is an S3 server on loopback.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from ports import free_port
from postgres_server import PostgresServer
from serving.process import Server
from test_docs import ROOT, lines
from tiny import IMAGE_TOKENS, WIDTH, random_unet, save_encoders, save_image_encoder, tiny_bundle

from cinemo import storage
from cinemo.bundle import read_card
from cinemo.config import Recipe
from cinemo.data.precompute.cluster import connect
from cinemo.media.mp4 import read_metadata
from cinemo.media.synthetic import render_clips
from cinemo.media.video import read_frames
from cinemo.methods import build_method
from cinemo.networks.dynamicrafter_weights import save_published
from cinemo.networks.weights import save_network
from cinemo.recipes import RECIPES, load_recipe
from cinemo.serving.settings import ServeSettings
from tests.pipelines.test_chain import main_of

pytestmark = [pytest.mark.slow, pytest.mark.release, pytest.mark.ray, pytest.mark.s3, pytest.mark.own_process]

SMALL = [
    "data.size=[32,48]", "data.frames=6", "data.frame_interval=[1,6]", "data.clips_per_shard=1", "data.fields=[]",
    "data.encode_gpus=0", "data.decode_tasks=1", "train.workers=1", "train.gpus_per_worker=0", "train.canary=0",
    "train.global_batch=2", "train.micro_batch=2", "train.max_steps=2", "train.precision=fp32", "train.sample_count=1",
    "train.sample_every=0", "sample.steps=2",
]  # fmt: skip
TOYS = {
    "cinemo-320x512": [
        *SMALL, "model.block_out_channels=[32,64]", "model.layers_per_block=1", "model.norm_num_groups=8",
        f"model.cross_attention_dim={WIDTH}", "model.attention_head_dim=1", "model.addition_time_embed_dim=32",
    ],
    "dynamicrafter-512": [
        *SMALL, "model.unet.model_channels=32", "model.unet.channel_mult=[1,2]", "model.unet.num_res_blocks=1",
        "model.unet.attention_resolutions=[1,2]", "model.unet.num_head_channels=16", f"model.unet.context_dim={WIDTH}",
        "model.resampler.dim=32", "model.resampler.depth=1", "model.resampler.dim_head=8", "model.resampler.heads=2",
        "model.resampler.num_queries=3", f"model.resampler.embedding_dim={WIDTH}",
        f"model.resampler.output_dim={WIDTH}", "model.resampler.video_length=6", "model.text_layers=1",
        f"model.image_tokens={IMAGE_TOKENS}",
    ],
}  # fmt: skip
# An autoencoder's, which makes sides eight times smaller.
DOWN, UP = {"down_block_types": ["DownEncoderBlock2D"] * 4}, {"up_block_types": ["UpDecoderBlock2D"] * 4}


def commands(page: str) -> dict[str, list[str]]:
    """The command lines of a page, by the heading of their section."""
    before, *parts = re.split(r"^## (.+)$", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    found = {heading: [*lines(text)] for heading, text in zip(["", *parts[::2]], [before, *parts[1::2]], strict=True)}
    return {heading: those for heading, those in found.items() if those}


def toy(monkeypatch: pytest.MonkeyPatch, name: str, *settings: str) -> Recipe:
    """From here on the recipe of that name is this one."""
    made = load_recipe(name, [*TOYS[name], *settings])
    monkeypatch.setitem(RECIPES, name, lambda: made)
    return made


@pytest.fixture
def place(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with all that the commands name; what they name on S3 is there."""
    for bucket in ("bucket", "models", "serving", "cinemo-serving"):
        boto3.client("s3").create_bucket(Bucket=bucket)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)

    save_encoders(Path("models/sd-v1-4"))
    for other in ("models/sd-2-1", "models/cinemo"):
        shutil.copytree("models/sd-v1-4", other)
    save_image_encoder(Path("models/clip-vit-h-14"))
    temporal = AutoencoderKLTemporalDecoder(block_out_channels=[32] * 4, **DOWN)
    temporal.save_pretrained("models/cinemo/vae_temporal_decoder")
    own = AutoencoderKL(block_out_channels=[8] * 4, latent_channels=16, norm_num_groups=4, **DOWN, **UP)
    own.save_pretrained("my-vae")
    storage.upload(Path("my-vae"), "s3://models/my-vae")
    storage.upload(Path("models/sd-v1-4"), "s3://bucket/models/sd-v1-4")

    save_network(random_unet(toy(monkeypatch, "cinemo-320x512")), Path("models/cinemo/unet"))
    networks = build_method(toy(monkeypatch, "dynamicrafter-512")).networks
    save_published(Path("model.ckpt"), networks["unet"], networks["image_proj"])

    manifest = render_clips(tmp_path, count=2, seed=7, size=(48, 72), frames=40)
    clips = [json.loads(line) for line in manifest.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(clips), "clips.parquet")
    for name in ("clips.parquet", *(clip["uri"] for clip in clips)):
        storage.write_bytes(f"s3://bucket/{name}", Path(name).read_bytes())
    PIL.Image.fromarray(read_frames(clips[0]["uri"], [0])[0]).save("photo.png")
    return tmp_path


@pytest.fixture
def ray_with_resources(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One Ray for all commands, in that directory; it offers what the nodes of docs/cluster.md do."""
    import ray

    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"decode": 2, "encode": 1}))
    ray.shutdown()
    connect(cpus=2)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_with_resources")
def test_the_pages_on_fine_tuning_and_clusters(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three trainings are left out, since each costs half a minute here and others do the same: that of docs/cluster.md
    (tests/pipelines/test_chain.py, which also submits them), that from published Cinemo weights (LoRA's below is from a
    folder too), and the proof of docs/howto/recover.md (tests/training/test_growth.py)."""

    def run(commands: list[str]) -> None:
        for line in commands:
            script, *flags = shlex.split(line)
            main_of(script.removesuffix(".py"), capfd, *flags)

    fine_tune, cluster = commands("howto/fine-tune.md"), commands("cluster.md")

    run(fine_tune.pop("Your own autoencoder"))
    assert storage.read_json("s3://bucket/dataset/dataset.json")["latent_shape"] == [6, 16, 4, 6]
    assert storage.read_json("s3://bucket/run/train.json")["steps"] == 2
    assert "step-000002.png" in storage.names("s3://bucket/run/samples")
    for name in ("dataset", "run"):
        storage.remove(f"s3://bucket/{name}")

    for name in TOYS:  # one dataset for all that follow; and fewer imports
        toy(monkeypatch, name, 'data.fields=["frames"]', "train.sample_count=0")
    precompute, _train = cluster.pop("Running")
    run([precompute])
    assert storage.read_json("s3://bucket/dataset/dataset.json")["latent_shape"] == [6, 4, 4, 6]

    run(fine_tune.pop("Published DynamiCrafter weights"))
    assert storage.read_json("s3://bucket/run/train.json")["steps"] == 2
    published, mine = (torch.load(name)["state_dict"] for name in ("model.ckpt", "mine.ckpt"))
    assert published.keys() == mine.keys()
    assert all(torch.equal(mine[name], value) for name, value in published.items())
    shutil.rmtree("bundle")

    export, probe, _train = fine_tune.pop("Published Cinemo weights")
    run([export, probe])
    assert read_card("bundle").provenance["source"] == "published Cinemo weights"

    run(fine_tune.pop("LoRA"))
    assert json.loads(read_metadata("snow.mp4")["comment"])["lora"] == "snow:0.8"

    run(["export.py --checkpoint s3://bucket/lora --output after"])
    shutil.move("bundle", "before")
    for name in storage.listing("s3://bucket/dataset"):
        storage.write_bytes(f"s3://{name.replace('dataset', 'held-out', 1)}", storage.read_bytes(f"s3://{name}"))
    run(fine_tune.pop("Has the motion survived?"))
    (before,) = storage.read_json("evaluation/metrics.json")["against"]
    assert before["drift"] is not None
    assert Path("evaluation/report.html").is_file()

    assert (fine_tune, cluster) == ({}, {}), "sections with commands that are not run"


@pytest.mark.postgres
def test_the_page_on_servers(
    place: Path, postgres: PostgresServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (by_flags, by_file, add_key), port = commands("server.md")[""], free_port()
    bundle = tiny_bundle(place / "made")
    for name in ("a", "cinemo-320x512"):
        storage.upload(bundle, f"s3://models/{name}")
    # The file that the page names, but for its database and what there is of a machine.
    database, file = postgres.new_database(), place / "serve.yaml"
    content = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())
    content["http_options"] = {"host": "127.0.0.1", "port": port}
    content["applications"][0]["args"] |= {"database": database, "gpus": 0, "cpus": 1, "http_replicas": 1}
    file.write_text(yaml.safe_dump(content))

    def words(line: str) -> list[str]:
        instead = {"postgresql://cinemo@db/cinemo": database, "cluster/serve.yaml": str(file)}
        return [instead.get(word, word) for word in shlex.split(line)][1:]

    # One server is started for both: flags and file say the same.
    served: list[ServeSettings] = []
    with monkeypatch.context() as patch:
        patch.setattr("cinemo.serving.app.serve_forever", lambda settings, *_, **__: served.append(settings))
        main_of("serve", capfd, *words(by_flags))
        main_of("serve", capfd, *words(by_file))
    assert [(one.bundle, one.state, one.database) for one in served] == [
        ("s3://models/a", "s3://serving/state", database),
        ("s3://models/cinemo-320x512", "s3://cinemo-serving/state", database),
    ]
    key = main_of("serve", capfd, *words(add_key)).split()[-1]
    server = Server(["pipelines/serve.py", *words(by_file)], port)
    try:
        assert server.post().status_code == 401
        server.client.headers["Authorization"] = f"Bearer {key}"
        assert server.wait(server.submit(num_inference_steps=2))["status"] == "completed"
    except BaseException:
        server.kill()
        raise
    server.stop()
    assert storage.names("s3://cinemo-serving/state/media")
