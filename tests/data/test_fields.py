"""Fields beside the latents: added to a finished dataset, exactly once, the latents untouched, read by the loader."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import webdataset
from data.small_data import film
from PIL import Image

from cinemo.config import Recipe, override
from cinemo.data import fields, sidecars
from cinemo.data.loader import LatentLoader
from cinemo.data.precompute import run
from cinemo.data.shards import DatasetIndex
from cinemo.media.flow import dense_flow
from cinemo.media.video import read_frames, write_video
from cinemo.networks.frozen import ImageEncoder, TextEncoder
from cinemo.types import InputError, LatentSample, RunError

ALL = ("text_states", "first_frame", "image_tokens", "flow")


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def stamps(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(directory.rglob("*")) if path.is_file()}


def samples_of(dataset: Path, names: tuple[str, ...] = ALL) -> list[LatentSample]:
    index = DatasetIndex.load(str(dataset))
    loader = LatentLoader(index, global_batch=1, lanes=1, seed=0, fields=names)
    sizes = enumerate(index.samples_of_shards.tolist())
    return [loader.sample(position, place) for position, size in sizes for place in range(size)]


@pytest.fixture(scope="module")
def recipe(small_recipe: Recipe, image_encoder: Path) -> Recipe:
    changes = ["data.views=2", f"encoders.image_encoder={image_encoder}"]
    return override(small_recipe, [*changes, f"data.fields={json.dumps(ALL)}"])


@pytest.fixture(scope="module")
def with_fields(finished: Path, recipe: Recipe, clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished dataset with all fields added, after checking that nothing else was touched."""
    copy = Path(shutil.copytree(finished, tmp_path_factory.mktemp("with") / "fields"))
    before, content = stamps(copy / "shards"), digests(copy)
    summary = run(recipe, str(clips_folder), str(copy))
    assert summary["done"] == 0
    assert {name: (made["done"], made["samples"]) for name, made in summary["fields"].items()} == dict.fromkeys(
        ALL, (18, 18)
    )
    assert stamps(copy / "shards") == before
    now = digests(copy)
    assert {name for name in content if now[name] != content[name]} == {"dataset.json"}  # which names the recipe
    return copy


@pytest.mark.ray
def test_layout_and_records(with_fields: Path) -> None:
    added = {name for name in digests(with_fields) if name.startswith("fields/")}
    assert added == {f"fields/{name}.json" for name in ALL} | {
        f"fields/{name}/shard-{k:06d}.{kind}" for name in ALL for k in range(3) for kind in ("tar", "json")
    }
    for name in ALL:
        info = json.loads((with_fields / f"fields/{name}.json").read_text())
        assert (info["complete"], info["shards"], info["samples"], info["missing"]) == (True, 3, 18, {})
        for k in range(3):
            record = json.loads((with_fields / f"fields/{name}/shard-{k:06d}.json").read_text())
            shard = json.loads((with_fields / f"shards/shard-{k:06d}.json").read_text())
            tar = (with_fields / f"fields/{name}/shard-{k:06d}.tar").read_bytes()
            assert (record["bytes"], record["sha256"]) == (len(tar), hashlib.sha256(tar).hexdigest())
            assert (record["shard_sha256"], record["fingerprint"]) == (shard["sha256"], info["fingerprint"])
            assert record["members"]["keys"] == shard["members"]["keys"]


@pytest.mark.ray
def test_every_field_is_what_its_source_gives(with_fields: Path, recipe: Recipe) -> None:
    text = TextEncoder(recipe.encoders.text_encoder, recipe.encoders.tokenizer)
    image = ImageEncoder(str(recipe.encoders.image_encoder))
    samples = samples_of(with_fields)
    assert len({sample.key for sample in samples}) == 18
    for sample in samples:
        indices = [sample.start_frame + k * sample.frame_interval for k in range(6)]
        frames = read_frames(sample.uri, indices, (32, 48))
        got = sample.fields
        assert [got[name].dtype for name in ("text_states", "image_tokens", "flow")] == [np.float16] * 3
        expected = text.encode([sample.caption])[0].numpy()
        np.testing.assert_allclose(got["text_states"], expected, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(got["image_tokens"], image.encode([frames[0]])[0].numpy(), rtol=2e-3, atol=2e-3)
        picture = np.asarray(Image.open(io.BytesIO(got["first_frame"])))
        assert cv2.PSNR(picture, frames[0]) > 35
        np.testing.assert_array_equal(got["flow"], dense_flow(frames, (4, 6)))
        assert np.median(got["flow"][:, 0]) == pytest.approx(-sample.frame_interval * 3 / 4, rel=0.15)  # film drifts


@pytest.mark.ray
def test_the_same_command_again_touches_nothing_and_plain_ones_keep_the_fields(
    with_fields: Path, recipe: Recipe, clips_folder: Path
) -> None:
    before = stamps(with_fields)
    assert {made["done"] for made in run(recipe, str(clips_folder), str(with_fields))["fields"].values()} == {0}
    assert stamps(with_fields) == before


@pytest.mark.ray
def test_with_the_latents_at_once_one_by_one_or_after_a_kill_the_bytes_are_the_same(
    with_fields: Path, finished: Path, recipe: Recipe, clips_folder: Path, tmp_path: Path
) -> None:
    at_once = tmp_path / "at once"
    run(recipe, str(clips_folder), str(at_once))
    assert digests(at_once) == digests(with_fields)

    killed = Path(shutil.copytree(with_fields, tmp_path / "killed"))
    for name in ("flow", "text_states"):
        place = killed / f"fields/{name}.json"
        place.write_text(json.dumps({**json.loads(place.read_text()), "complete": False}))
    (killed / "fields/text_states/shard-000000.json").unlink()
    (killed / "fields/text_states/shard-000000.tar").write_bytes(b"half a sidecar")
    (killed / "fields/flow/shard-000002.tar").unlink()
    (killed / "fields/flow/.shard-000002.tar.abc.partial").write_bytes(b"what a killed process leaves")
    summary = run(recipe, str(clips_folder), str(killed))
    assert {name for name, made in summary["fields"].items() if made["done"]} == {"flow", "text_states"}
    assert digests(killed) == digests(with_fields)

    alone = Path(shutil.copytree(finished, tmp_path / "alone"))
    run(override(recipe, ['data.fields=["first_frame"]']), str(clips_folder), str(alone))
    run(override(recipe, ['data.fields=["flow","first_frame"]']), str(clips_folder), str(alone))
    for name in ("first_frame", "flow"):
        assert digests(alone / f"fields/{name}") == digests(with_fields / f"fields/{name}")


@pytest.mark.ray
def test_sources_that_are_gone_are_counted_and_the_start_of_a_clip_is_kept(
    ray_session: None, recipe: Recipe, clips_folder: Path, tmp_path: Path
) -> None:
    rows = []
    for number in range(3):
        shutil.copy(clips_folder / f"film {number}.mp4", tmp_path / f"{number}.mp4")
        rows.append({"clip_id": f"clip-{number}", "uri": f"{number}.mp4", "caption": "a film", "start": 0.4})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest, output = str(tmp_path / "manifest.jsonl"), tmp_path / "out"
    run(override(recipe, ["data.fields=[]"]), manifest, str(output))
    (tmp_path / "1.mp4").unlink()
    (tmp_path / "2.mp4").write_bytes(b"something else")
    summary = run(override(recipe, ['data.fields=["first_frame","text_states"]']), manifest, str(output))
    assert summary["fields"]["first_frame"]["missing"] == {"missing": 2, "unreadable": 2}  # two views each
    assert (summary["fields"]["first_frame"]["samples"], summary["fields"]["text_states"]["samples"]) == (2, 6)
    for sample in samples_of(output, ("first_frame", "text_states")):
        assert sample.start_frame >= 10
        assert set(sample.fields) == {"text_states", *(["first_frame"] if sample.clip_id == "clip-0" else [])}
        if "first_frame" in sample.fields:
            frame = read_frames(clips_folder / "film 0.mp4", [sample.start_frame], (32, 48))[0]
            assert cv2.PSNR(np.asarray(Image.open(io.BytesIO(sample.fields["first_frame"]))), frame) > 35


@pytest.mark.ray
def test_shards_of_a_retry_get_theirs(with_fields: Path, recipe: Recipe, clips_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(with_fields, tmp_path / "copy"))
    broken = clips_folder / "film 1b.mp4"
    content = broken.read_bytes()
    write_video(broken, film("mended", 30), 25)
    try:
        run(override(recipe, ["data.fields=[]"]), str(clips_folder), str(copy), retry_quarantine="unreadable")
        with pytest.raises(InputError, match="field flow is not complete, it covers 3 of 4 shards; run the same"):
            samples_of(copy, ("flow",))
        summary = run(recipe, str(clips_folder), str(copy))
    finally:
        broken.write_bytes(content)
    assert {made["done"] for made in summary["fields"].values()} == {2}
    assert len(samples_of(copy)) == 20
    assert {
        name: digest for name, digest in digests(copy / "fields").items() if "shard-000003" not in name and "/" in name
    } == {name: digest for name, digest in digests(with_fields / "fields").items() if "/" in name}


@pytest.mark.ray
def test_another_encoder_is_refused_before_anything_is_done(
    with_fields: Path, recipe: Recipe, clips_folder: Path, encoders: Path
) -> None:
    before = stamps(with_fields)
    other = override(recipe, [f"encoders.text_encoder={encoders / 'text_encoder'}"])
    with pytest.raises(
        InputError, match=r"holds another text_states: text_encoder is '\w+' there and '\w+' here; remove"
    ):
        run(other, str(clips_folder), str(with_fields))
    nothing = override(recipe, ["encoders.image_encoder=null"])
    with pytest.raises(InputError, match=r"encoders\.image_encoder is not set: expected the directory of a CLIPVision"):
        run(nothing, str(clips_folder), str(with_fields))
    assert stamps(with_fields) == before


@pytest.mark.ray
def test_webdataset_reads_a_sidecar_alone_and_beside_its_shard(with_fields: Path) -> None:
    latents = str(with_fields / "shards/shard-000000.tar")
    states = str(with_fields / "fields/text_states/shard-000000.tar")
    alone = {entry["__key__"]: entry for entry in webdataset.WebDataset(states, shardshuffle=False).decode()}
    expected = {sample.key: sample for sample in samples_of(with_fields)}
    for entry in webdataset.WebDataset(latents, shardshuffle=False).decode():
        joined = {**entry, **alone[entry["__key__"]]}
        sample = expected[entry["__key__"]]
        np.testing.assert_array_equal(joined["text_states.npy"], sample.fields["text_states"])
        np.testing.assert_array_equal(joined["latents.npy"], sample.latents_FCHW)
    pictures = webdataset.WebDataset(str(with_fields / "fields/first_frame/shard-000000.tar"), shardshuffle=False)
    assert all(entry["first_frame.jpg"].shape == (32, 48, 3) for entry in pictures.decode("rgb8"))


@pytest.mark.ray
def test_the_loader_refuses_what_is_absent_or_damaged(with_fields: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"has no field flow; run the same precompute\.py command with --set data\.fields"
    ):
        samples_of(finished, ("flow",))
    assert samples_of(with_fields, ())[0].fields == {}
    copy = Path(shutil.copytree(with_fields, tmp_path / "copy"))
    tar = copy / "fields/flow/shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    with pytest.raises(RunError, match=r"flow/shard-000000\.tar: sha256 is .* its record says .* remove"):
        samples_of(copy, ("flow",))
    tar.unlink()
    with pytest.raises(RunError, match=r"flow/shard-000000\.tar: the sidecar or its record cannot be read"):
        samples_of(copy, ("flow",))


def test_a_field_depends_on_its_own_keys_alone(recipe: Recipe, encoders: Path) -> None:
    before = {name: fields.identity(name, recipe)[0] for name in ALL}
    for change, expected in {
        "data.size=[32,56]": {"first_frame", "image_tokens", "flow"},
        "data.decoder=decord": {"first_frame", "image_tokens", "flow"},
        "data.frames=7": {"flow"},
        "data.encode_gpus=1": {"text_states", "image_tokens"},
        f"encoders.tokenizer={encoders / 'tokenizer'}": {"text_states"},
        f"encoders.vae={encoders / 'none'}": set(),
        "train.lr=0.5": set(),
    }.items():
        after = override(recipe, [change])
        assert {name for name in ALL if fields.identity(name, after)[0] != before[name]} == expected


def test_a_state_beyond_float16_is_left_out() -> None:
    values = torch.tensor([[[1.0]], [[1e6]], [[2.0]]])
    made = list(fields._in_batches([0, 1, 2], 3, lambda batch: values[list(batch)]))
    assert [content is None for content in made] == [False, True, False]


def test_sidecar_bytes_do_not_depend_on_when_they_are_made() -> None:
    members = [("a-0.flow.npy", sidecars.array_bytes(np.arange(6, dtype=np.float16))), ("b-0.flow.npy", b"")]
    tar, offsets = sidecars.encode_tar(members)
    assert (tar, offsets) == sidecars.encode_tar(members)
    size = len(members[0][1])
    array = sidecars.read_array(memoryview(tar)[offsets[0] : offsets[0] + size])
    np.testing.assert_array_equal(array, np.arange(6, dtype=np.float16))
