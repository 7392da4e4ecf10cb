"""Fields beside the latents: added to a finished dataset, exactly once, the latents untouched, read by the loader."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
import webdataset
from data.small_data import digests, film, stamps
from PIL import Image

from cinemo import storage
from cinemo.checksums import checksum
from cinemo.config import Recipe
from cinemo.data.dataset import fields, sidecars
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.dataset.verify import verify
from cinemo.data.loading.loader import LatentLoader
from cinemo.data.precompute.graph import run
from cinemo.media.flow import dense_flow
from cinemo.media.mp4 import write_video
from cinemo.media.stills import frame_of
from cinemo.media.video import decode_clip, read_frames
from cinemo.networks.frozen import ImageEncoder, TextEncoder
from cinemo.recipes import override
from cinemo.types import Clip, InputError, LatentSample, RunError

pytestmark = pytest.mark.slow

ALL = ("text_states", "first_frame", "frames", "image_tokens", "frame_tokens", "flow")


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def samples_of(dataset: Path | str, names: tuple[str, ...] = ALL) -> list[LatentSample]:
    index = DatasetIndex.load(str(dataset))
    loader = LatentLoader(index, global_batch=1, lanes=1, seed=0, fields=names)
    sizes = enumerate(index.samples_of_shards.tolist())
    return [loader.sample(position, place) for position, size in sizes for place in range(size)]


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
            assert (record["bytes"], record["checksum"]) == (len(tar), checksum([tar]))
            assert (record["shard_checksum"], record["fingerprint"]) == (shard["checksum"], info["fingerprint"])
            assert record["members"]["keys"] == shard["members"]["keys"]


@pytest.mark.ray
def test_every_field_is_what_its_source_gives(with_fields: Path, field_recipe: Recipe) -> None:
    text = TextEncoder(field_recipe.encoders.text_encoder, field_recipe.encoders.tokenizer)
    image = ImageEncoder(str(field_recipe.encoders.image_encoder))
    samples = samples_of(with_fields)
    assert len({sample.key for sample in samples}) == 18
    for sample in samples:
        indices = [sample.start_frame + k * sample.frame_interval for k in range(6)]
        frames = read_frames(sample.uri, indices, (32, 48))
        got = sample.fields
        arrays = [value.dtype for value in got.values() if not isinstance(value, bytes)]
        assert arrays == [np.float16] * 4
        expected = text.encode([sample.caption])[0].numpy()
        np.testing.assert_allclose(got["text_states"], expected, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(got["image_tokens"], image.encode([frames[0]])[0].numpy(), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(got["frame_tokens"], image.encode(frames).numpy(), rtol=2e-3, atol=2e-3)
        picture = np.asarray(Image.open(io.BytesIO(got["first_frame"])))
        assert cv2.PSNR(picture, frames[0]) > 35
        for place, frame in enumerate(frames):
            assert cv2.PSNR(frame_of(got["frames"], len(frames), place), frame) > 35
        np.testing.assert_array_equal(got["flow"], dense_flow(frames, (4, 6)))
        assert np.median(got["flow"][:, 0]) == pytest.approx(-sample.frame_interval * 3 / 4, rel=0.15)  # film drifts


@pytest.mark.ray
def test_the_same_command_again_touches_nothing_and_plain_ones_keep_the_fields(
    with_fields: Path, field_recipe: Recipe, clips_folder: Path
) -> None:
    before = stamps(with_fields)
    assert {made["done"] for made in run(field_recipe, str(clips_folder), str(with_fields))["fields"].values()} == {0}
    assert stamps(with_fields) == before


@pytest.mark.ray
def test_fields_are_added_and_a_killed_run_goes_on_while_shards_stay_as_they_are(
    with_fields: Path, field_recipe: Recipe, clips_folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(with_fields, tmp_path / "copy"))
    shutil.rmtree(copy / "fields/first_frame")  # was never asked for
    (copy / "fields/first_frame.json").unlink()
    for name in ("flow", "text_states"):  # a run that was killed in the middle of these
        change_json(copy / f"fields/{name}.json", complete=False)
    (copy / "fields/text_states/shard-000000.json").unlink()
    (copy / "fields/text_states/shard-000000.tar").write_bytes(b"half a sidecar")
    (copy / "fields/flow/shard-000002.tar").unlink()
    (copy / "fields/flow/.shard-000002.tar.abc.partial").write_bytes(b"what a killed process leaves")
    before = stamps(copy / "shards") | stamps(copy / "fields/image_tokens")

    broken = clips_folder / "film 1b.mp4"
    content = broken.read_bytes()
    write_video(broken, film("mended", 30), 25)
    try:  # and a clip can be used now: its new shard gets sidecars as well
        summary = run(field_recipe, str(clips_folder), str(copy), retry_quarantine="unreadable")
    finally:
        broken.write_bytes(content)
    assert {name: made["samples"] for name, made in summary["fields"].items()} == dict.fromkeys(ALL, 20)
    now = stamps(copy)
    assert {name: now[name] for name in before} == before
    expected, there = digests(with_fields), digests(copy)
    assert expected.pop("quarantine/shard-000000.jsonl")  # that clip was its only one
    assert {name for name in expected if there[name] != expected[name]} == {
        "dataset.json", "index.parquet", *(f"fields/{name}.json" for name in ALL)
    }  # fmt: skip
    assert {name for name in there if name not in expected} - {"columns/shard-000003.parquet"} == {
        f"{place}/shard-000003.{kind}"
        for place in ("shards", *(f"fields/{name}" for name in ALL))
        for kind in ("tar", "json")
    }
    assert {name for sample in samples_of(copy) for name in sample.fields} == set(ALL)


@pytest.mark.ray
def test_a_shard_whose_clips_were_all_refused_has_empty_sidecars(
    with_fields: Path, field_recipe: Recipe, clips_folder: Path, tmp_path: Path
) -> None:
    recipe = override(field_recipe, ["data.clips_per_shard=1"])
    clips, dataset = tmp_path / "clips", str(tmp_path / "out")
    clips.mkdir()
    for name in ("film 1.mp4", "film 1.txt", "film 1b.mp4", "film 1b.txt"):
        shutil.copy(clips_folder / name, clips / name)
    summary = run(recipe, str(clips), dataset)
    assert {name: (made["samples"], made["missing"]) for name, made in summary["fields"].items()} == {
        name: (2, {}) for name in ALL
    }
    assert DatasetIndex.load(dataset).samples_of_shards.tolist() == [2, 0]
    assert [set(sample.fields) for sample in samples_of(dataset)] == [set(ALL)] * 2
    assert verify(dataset, recipe, 2)["canary"]["equal"] == 2


@pytest.mark.ray
def test_sources_that_are_gone_are_counted(
    with_fields: Path, field_recipe: Recipe, clips_folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(with_fields, tmp_path / "copy"))
    wanted = ["first_frame", "frame_tokens", "image_tokens", "text_states"]
    todo = pa.Table.from_pylist([{"shard": 0, "fields": wanted}], fields.TODO)
    gone, altered = clips_folder / "film 1.mp4", clips_folder / "film 2.mp4"
    contents = {path: path.read_bytes() for path in (gone, altered)}
    gone.unlink()
    altered.write_bytes(b"something else")
    try:
        made = fields.read(todo, str(copy), field_recipe)
    finally:
        for path, content in contents.items():
            path.write_bytes(content)
    encode = fields.Encoder(wanted, field_recipe.encoders, "float32")
    fields.commit(encode(made), str(copy), dict.fromkeys(wanted, "f"))
    for name in wanted:
        record = json.loads((copy / f"fields/{name}/shard-000000.json").read_text())
        assert record["missing"] == ({} if name == "text_states" else {"missing": 2, "unreadable": 2})  # two views each
        assert record["samples"] == (6 if name == "text_states" else 2)
    ids = {sample.clip_id for sample in samples_of(copy) if "image_tokens" not in sample.fields}
    assert ids == {"film-1", "film-2"}


@pytest.mark.ray
def test_another_encoder_is_refused_before_anything_is_done(
    with_fields: Path, field_recipe: Recipe, clips_folder: Path, encoders: Path
) -> None:
    before = stamps(with_fields)
    other = override(field_recipe, [f"encoders.text_encoder={encoders / 'text_encoder'}"])
    with pytest.raises(
        InputError, match=r"holds another text_states: text_encoder is '\w+' there and '\w+' here; remove"
    ):
        run(other, str(clips_folder), str(with_fields))
    nothing = override(field_recipe, ["encoders.image_encoder=null"])
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
def test_the_loader_refuses_what_is_absent_or_damaged(with_fields: Path, tmp_path: Path) -> None:
    assert samples_of(with_fields, ())[0].fields == {}
    copy = Path(shutil.copytree(with_fields, tmp_path / "copy"))
    (copy / "fields/text_states.json").unlink()
    advice = r"run the same precompute\.py command with --set data\.fields"
    with pytest.raises(InputError, match=f"has no field text_states; {advice}"):
        samples_of(copy, ("text_states",))
    change_json(copy / "fields/image_tokens.json", shards=2)
    with pytest.raises(InputError, match=f"image_tokens is not complete, it covers 2 of 3 shards; {advice}"):
        samples_of(copy, ("image_tokens",))
    tar = copy / "fields/flow/shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    with pytest.raises(RunError, match=r"flow/shard-000000\.tar: has blake3 .* its record says .* remove"):
        samples_of(copy, ("flow",))
    tar.unlink()
    with pytest.raises(RunError, match=r"flow/shard-000000\.tar: the sidecar or its record cannot be read"):
        samples_of(copy, ("flow",))


@pytest.mark.ray
@pytest.mark.s3
def test_sidecars_on_s3(with_fields: Path, s3_endpoint: str) -> None:
    storage.upload(with_fields, "s3://cinemo-test/with-fields")
    local, remote = samples_of(with_fields, ("flow",)), samples_of("s3://cinemo-test/with-fields", ("flow",))
    assert [sample.key for sample in remote] == [sample.key for sample in local]
    np.testing.assert_array_equal(remote[-1].fields["flow"], local[-1].fields["flow"])


@pytest.mark.parametrize("name", ["mma_test_mpeg4.avi", "flower_vp8.webm", "bikes.mp4"])
def test_frames_decoded_again_are_the_very_frames(real_clips: Path, field_recipe: Recipe, name: str) -> None:
    (path,) = real_clips.rglob(name)
    views = decode_clip(Clip("clip", str(path), "", start=0.3), field_recipe.data)
    stored = [{"uri": str(path), "start_frame": v.start_frame, "frame_interval": v.frame_interval} for v in views]
    for view, again_FHWC in zip(views, fields.decode_again(stored, field_recipe.data, 6), strict=True):
        np.testing.assert_array_equal(again_FHWC, view.frames_FHWC)
    first_HWC = fields.decode_again(stored[1:], field_recipe.data, 1)[0][0]
    np.testing.assert_array_equal(first_HWC, views[1].frames_FHWC[0])


def test_a_field_depends_on_its_own_keys_alone(field_recipe: Recipe, encoders: Path) -> None:
    before = {name: fields.identity(name, field_recipe)[0] for name in ALL}
    decoded = set(ALL) - {"text_states"}
    for change, expected in {
        "data.size=[32,56]": decoded,
        "data.decoder=decord": decoded,
        "data.frames=7": {"flow", "frames", "frame_tokens"},
        "data.encode_gpus=1": {"text_states", "image_tokens", "frame_tokens"},
        f"encoders.tokenizer={encoders / 'tokenizer'}": {"text_states"},
        f"encoders.vae={encoders / 'none'}": set(),
        "train.lr=0.5": set(),
    }.items():
        after = override(field_recipe, [change])
        assert {name for name in ALL if fields.identity(name, after)[0] != before[name]} == expected


def test_a_state_beyond_float16_is_left_out() -> None:
    values = torch.tensor([[[1.0]], [[1e6]], [[2.0]]])
    made = fields._in_batches([0, 1, 2], 3, lambda batch: values[list(batch)])
    assert [fields._file(state) is None for state in made] == [False, True, False]


def test_sidecar_bytes_do_not_depend_on_when_they_are_made() -> None:
    members = [("a-0.flow.npy", sidecars.array_bytes(np.arange(6, dtype=np.float16))), ("b-0.flow.npy", b"")]
    tar, offsets = sidecars.encode_tar(members)
    assert (tar, offsets) == sidecars.encode_tar(members)
    size = len(members[0][1])
    array = sidecars.read_array(memoryview(tar)[offsets[0] : offsets[0] + size])
    np.testing.assert_array_equal(array, np.arange(6, dtype=np.float16))
