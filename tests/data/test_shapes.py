"""Several sizes and lengths in one dataset: one shape a clip, one a shard, one a batch, in the order of ever."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.small_data import digests, film, make_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cinemo import storage
from cinemo.cache import Damaged
from cinemo.config import DataConfig, Recipe
from cinemo.data.dataset import fields, shards
from cinemo.data.dataset.shards import DatasetIndex, pixels
from cinemo.data.dataset.verify import verify
from cinemo.data.loading.source import Source
from cinemo.data.manifest.manifest import SCHEMA, Manifest, manifest_of, read_manifest
from cinemo.data.precompute import stages
from cinemo.data.precompute.dataset import Dataset
from cinemo.data.precompute.estimate import plan_only
from cinemo.data.precompute.plan import Plan, cut_by_shape
from cinemo.data.precompute.probing import Probe, extents_of, measured_here
from cinemo.data.precompute.shapes import kinds, nearest, stated
from cinemo.data.precompute.wording import plan_lines
from cinemo.media.mp4 import write_video
from cinemo.progress import Work
from cinemo.recipes import override
from cinemo.training.run.growth import TrainingData
from cinemo.training.run.proof import _against_index
from cinemo.types import Clip, InputError, LatentSample

WIDE, TALL, SHORT = (6, 32, 48), (6, 48, 32), (3, 32, 48)


@pytest.fixture(scope="module")
def recipe(small_recipe: Recipe) -> Recipe:
    """6 frames of 48x32 or 32x48, or 3 of 48x32, at interval 1-3; four clips a shard."""
    return override(small_recipe, [f"data.other_shapes={[list(TALL), list(SHORT)]}"])


# --- which shape a clip has ------------------------------------------------------------------------------------------

one_shape = st.tuples(st.integers(2, 32), *[st.integers(1, 8).map(lambda cells: 8 * cells)] * 2)


@given(
    st.lists(one_shape, min_size=1, max_size=6, unique=True),
    st.integers(1, 4),
    st.lists(st.tuples(*[st.integers(1, 200)] * 3), min_size=1, max_size=5),
)
def test_every_clip_has_the_shape_that_fits_it_best(
    shapes: list[tuple[int, int, int]], interval: int, clips: list[tuple[int, int, int]]
) -> None:
    found = nearest(shapes, interval, np.array(clips, np.float64))
    for (width, height, frames), number in zip(clips, found.tolist(), strict=True):
        own = shapes[number]

        def off(shape: tuple[int, int, int], aspect: float = width / height) -> float:
            return abs(math.log(aspect) - math.log(shape[2] / shape[1]))

        near = [shape for shape in shapes if off(shape) <= min(map(off, shapes)) + 1e-9]
        fitting = [shape[0] for shape in near if (shape[0] - 1) * interval + 1 <= frames]
        assert own in near
        assert own[0] == (max(fitting) if fitting else min(shape[0] for shape in near))
        alike = [shape for shape in near if shape[0] == own[0]]
        kept = [shape for shape in alike if shape[1] <= height and shape[2] <= width]
        areas = [shape[1] * shape[2] for shape in kept or alike]
        assert own[1] * own[2] == (max(areas) if kept else min(areas))


def test_a_clip_of_which_nothing_is_known_has_the_recipes_own_shape() -> None:
    unknown = np.array([[np.nan, np.nan, np.nan], [np.nan, 100, 50]])
    assert nearest([WIDE, TALL], 1, unknown).tolist() == [0, 0]


def rows_of(tmp_path: Path, suffix: str, clips: list[dict[str, Any]]) -> Manifest:
    table = [{"clip_id": f"c{k}", "uri": f"/{k}.mp4", "caption": "x", **clip} for k, clip in enumerate(clips)]
    path = tmp_path / f"clips{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif suffix == ".csv":
        names = list(table[0])
        lines = [",".join("" if row[name] is None else str(row[name]) for name in names) for row in table]
        path.write_text("\n".join([",".join(names), *lines]) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(table), path)
    return read_manifest(str(path))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_columns_tell_what_they_tell(tmp_path: Path, suffix: str) -> None:
    none = dict.fromkeys(("start", "end", "duration", "num_frames", "fps", "width", "height"))
    size = none | {"width": 64, "height": 48}
    listed = rows_of(
        tmp_path,
        suffix,
        [
            size | {"fps": 25.0, "duration": 2.0 if suffix == ".parquet" else "00:00:02"},
            size | {"fps": 25.0, "start": 100, "end": 101.0, "duration": 1.0},
            size | {"fps": 25.0, "start": 1, "duration": 4.0},  # the file's or the clip's, nobody knows
            size | {"num_frames": 31},
            size | {"num_frames": 31, "start": 0.5, "end": 1},
            none | {"width": 0, "height": 48, "num_frames": 10},
        ],
    )
    several, same = DataConfig(other_shapes=((8, 320, 512),)), DataConfig(other_shapes=((16, 512, 320),))
    nan = np.nan
    expected = [(64, 48, 50), (64, 48, 25), (64, 48, nan), (64, 48, 31), (64, 48, nan), (nan, 48, 10)]
    np.testing.assert_equal(stated(listed, np.arange(6), several), np.array(expected))
    assert np.isinf(stated(listed, np.arange(6), same)[:, 2]).all()  # length makes no difference


def test_columns_of_any_type_tell_numbers(tmp_path: Path) -> None:
    """One value that is none leaves the others as they are."""
    names = {name: [f"{name}{k}" for k in range(3)] for name in ("clip_id", "uri", "caption")}
    columns = {
        "width": pa.array(["64", "64px", None], pa.large_string()),
        "height": pa.array([48, 2**64 - 1, 0], pa.uint64()),
        "num_frames": pa.array(["20", "x", "-1"]).dictionary_encode(),
    }
    pq.write_table(pa.table({**names, **columns}), tmp_path / "clips.parquet")
    found = stated(
        read_manifest(str(tmp_path / "clips.parquet")), np.arange(3), DataConfig(other_shapes=((8, 320, 512),))
    )
    np.testing.assert_equal(found, [(64, 48, 20), (np.nan, 2.0**64, np.nan), (np.nan, np.nan, np.nan)])


def test_what_was_measured_is_kept_for_those_clips_only(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another recipe may have to measure as many, beginning with the same one."""
    clips = [{"clip_id": str(k), "uri": f"/{k}.mp4", "caption": ""} for k in range(4)]
    plan, asked = Plan(manifest_of(pa.Table.from_pylist(clips)), 4, 1), list[list[int]]()

    def measured(self: Probe, plan: Plan, rows: np.ndarray, work: Work) -> np.ndarray:
        asked.append(rows.tolist())
        return np.repeat(rows[:, None], 3, 1).astype(np.float64)

    monkeypatch.setattr(Probe, "_measured", measured)
    for rows in ([0, 1, 3], [0, 2, 3], [0, 1, 3]):
        ((_, extents),) = Probe(str(tmp_path / "output"), recipe)(plan, np.array(rows))
        assert extents[:, 0].tolist() == rows
    assert asked == [[0, 1, 3], [0, 2, 3]]


def test_files_tell_it_where_columns_do_not(tmp_path: Path) -> None:
    write_video(tmp_path / "wide.mp4", film("a", 20), 10)
    write_video(tmp_path / "tall.mp4", film("b", 7, 64, 48), 10)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    clips = [
        Clip("a", str(tmp_path / "wide.mp4"), ""),
        Clip("b", str(tmp_path / "wide.mp4"), "", start=0.5, end=1.1),
        Clip("c", str(tmp_path / "tall.mp4"), ""),
        Clip("d", str(tmp_path / "broken.mp4"), ""),
        Clip("e", str(tmp_path / "nowhere.mp4"), ""),
    ]
    found = np.array(extents_of(clips, 60))
    nothing = (np.nan,) * 3
    np.testing.assert_equal(found, np.array([(64, 48, 20), (64, 48, 6), (48, 64, 7), nothing, nothing]))


def test_stages_make_what_a_recipe_of_that_shape_alone_makes(recipe: Recipe, tmp_path: Path) -> None:
    """Also where the processes that decode and encode have just done another shape."""
    paths = [str(tmp_path / name) for name in ("wide.mp4", "tall.mp4", "short.mp4")]
    for path, kind in zip(paths, ((20, 48, 64), (20, 64, 48), (4, 48, 64)), strict=True):
        write_video(path, film(path[-8:], *kind), 25)
    rows = [
        {"shard": k, "shard_clips": 1, "position": k, "clip_id": f"c{k}", "uri": path, "caption": "x"}
        for k, path in enumerate(paths)
    ]
    encoder = stages.Encoder(recipe.data, recipe.encoders.vae, "sample", "float32")
    decoded = []
    for row, shape in zip(rows * 2, recipe.data.shapes * 2, strict=True):
        planned = pa.Table.from_pylist([row | {"start": None, "end": None, "extra": None, "video_shape": list(shape)}])
        decoded.append(stages.score(stages.decode(planned, recipe.data), recipe.data))
    made = encoder(pa.concat_tables(decoded)).to_pylist()  # rows of several shapes in one batch
    for row, shape in zip(made, recipe.data.shapes * 2, strict=True):
        assert row["reason"] is None
        assert row["shape"] == [shape[0], 4, shape[1] // 8, shape[2] // 8]
    assert [row["latents"] for row in made[3:]] == [row["latents"] for row in made[:3]]
    alone = recipe.of_shape(TALL).data
    planned = pa.Table.from_pylist([rows[1] | {"start": None, "end": None, "extra": None}])
    expected = encoder.encode(
        np.frombuffer(stages.decode(planned, alone)["frames"][0].as_py(), np.uint8).reshape(*TALL, 3), "c1", 0
    )
    assert made[1]["latents"] == expected.tobytes()


@pytest.mark.slow
@pytest.mark.ray
def test_a_file_that_ends_its_reader_is_left_to_the_decoder(ray_session: None, recipe: Recipe, tmp_path: Path) -> None:
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", film(str(number), 9), 10)
    clips = [{"clip_id": str(k), "uri": str(tmp_path / f"{k}.mp4"), "caption": ""} for k in range(2)]
    listed = manifest_of(pa.Table.from_pylist(clips))
    plan, rows, output = Plan(listed, 4, 1), np.arange(2), str(tmp_path / "output")
    known, unknown = np.array([(64, 48, 9)] * 2), np.full((2, 3), np.nan)
    hostile = override(recipe, ["data.clip_timeout=0.00001"])  # any file ends the process by its alarm
    for measure in (Probe(output, hostile), partial(measured_here, seconds=hostile.data.clip_timeout)):
        ((part, extents),) = measure(plan, rows)
        np.testing.assert_equal((part, extents), (rows, unknown))
        assert kinds(plan, recipe.data, measure).tolist() == [0, 0]
    kept = list((tmp_path / "output/.shapes").iterdir())
    assert len(kept) == 1
    kept[0].unlink()
    for measure in (Probe(output, recipe), partial(measured_here, seconds=60)):
        ((_, extents),) = measure(plan, rows)
        np.testing.assert_equal(extents, known)
    (tmp_path / "0.mp4").unlink()
    ((_, again),) = Probe(output, recipe)(plan, rows)  # not read a second time
    np.testing.assert_equal(again, known)


def test_a_plan_measures_clips_as_they_will_be(recipe: Recipe, tmp_path: Path) -> None:
    clips = []
    for number, (frames, height, width) in enumerate([(20, 48, 64), (20, 64, 48), (4, 48, 64)] * 2):
        write_video(tmp_path / f"{number}.mp4", film(str(number), frames, height, width), 25)
        clips.append({"uri": f"{number}.mp4", "width": width, "height": height, "num_frames": frames})
    rows_of(tmp_path, ".csv", clips)
    plan = plan_only(recipe, str(tmp_path / "clips.csv"), str(tmp_path / "output"))
    assert plan["shapes"] == [{"frames": shape[0], "size": list(shape[1:]), "clips": 2} for shape in recipe.data.shapes]
    assert "shapes among them: 48x32x6 2, 32x48x6 2, 48x32x3 2" in plan_lines(plan, "output")
    assert plan["figures"]["quarantine_share"]["value"] == 0
    latents = [4 * math.prod(shape) // 64 * 2 for shape in recipe.data.shapes]  # float16
    assert 0 < plan["figures"]["bytes"]["value"] / 2 - sum(latents) < 3 * 2560  # headers and metadata in blocks of 512


# --- which shard it is in --------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 7))
def test_shards_are_pure_and_hold_every_clip_once(of_clips: list[int], size: int) -> None:
    order, bounds = cut_by_shape(np.array(of_clips, np.uint8), size)
    assert sorted(order.tolist()) == list(range(len(of_clips)))
    parts = [order[begin:end].tolist() for begin, end in itertools.pairwise(bounds)]
    assert all(part == sorted(part) and len({of_clips[clip] for clip in part}) == 1 for part in parts)
    assert [part[0] for part in parts] == sorted(part[0] for part in parts)
    for kind in set(of_clips):
        sizes = [len(part) for part in parts if of_clips[part[0]] == kind]
        assert all(count == size for count in sizes[:-1])
        assert 0 < sizes[-1] <= size
    plain = cut_by_shape(np.zeros(len(of_clips), np.uint8), size)  # one shape is the plan of ever
    assert plain[0].tolist() == list(range(len(of_clips)))


def manifest(extents: list[tuple[int, int, int]], first: int = 0) -> Manifest:
    """Clips whose columns say their width, height and frames."""
    rows = [
        {"clip_id": f"clip-{k}", "uri": f"/{k}.mp4", "caption": f"c{k}", "start": None, "end": None}
        | dict(zip(("width", "height", "num_frames"), extent, strict=True))
        for k, extent in enumerate(extents, first)
    ]
    schema = pa.schema([*SCHEMA, *((name, pa.int64()) for name in ("width", "height", "num_frames"))])
    return manifest_of(pa.Table.from_pylist(rows, schema))


def unmeasured(plan: Plan, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    raise AssertionError("the columns say everything")
    yield


def test_rows_of_a_plan_say_their_shape(recipe: Recipe) -> None:
    extents = [(64, 48, 20), (48, 64, 20), (64, 48, 4)] * 5 + [(64, 48, 20)]
    plan, data = Plan(manifest(extents), 4, 1), recipe.data
    numbers = kinds(plan, data, unmeasured)
    assert numbers.tolist() == [0, 1, 2] * 5 + [0]
    shaped = Plan(plan.clips, 4, 1, kinds=numbers, shapes=data.shapes)
    rows = shaped.rows(shaped.numbers)
    table = rows.slice().to_pylist()
    assert [row["position"] for row in table] == list(range(16))
    assert {row["clip_id"]: tuple(row["video_shape"]) for row in table} == {
        f"clip-{k}": data.shapes[number] for k, number in enumerate(numbers.tolist())
    }
    assert all(len({tuple(row["video_shape"]) for row in table if row["shard"] == k}) == 1 for k in shaped.numbers)
    for wave in rows.waves(1000):  # a commit takes `clips_per_shard` rows: only the last shard of a wave may be smaller
        sizes = list(Counter(wave.shards.tolist()).values())
        assert set(sizes[:-1]) <= {4}
    assert pa.concat_tables(wave.slice() for wave in rows.waves(5)) == rows.slice()


# --- a dataset of them -----------------------------------------------------------------------------------------------


def encoded(planned: pa.Table) -> pa.Table:
    """What decoding, scoring and encoding would hand on; every seventh clip is refused."""
    made = []
    for row in planned.to_pylist():
        sample, bad = make_sample(int(row["clip_id"].removeprefix("clip-"))), row["clip_id"].endswith("7")
        frames, height, width = row["video_shape"]
        latents = np.resize(sample.latents_FCHW, (frames, 4, height // 8, width // 8))
        fault = {"stage": "open", "reason": "missing", "detail": "no such file"} if bad else {}
        stored = {} if bad else {"latents": latents.tobytes(), "shape": latents.shape}
        view = {"view": 0, "fps": 24.0, "frame_interval": 3, "start_frame": 0, "ssim": sample.ssim}
        seconds = dict.fromkeys(("decode_seconds", "score_seconds", "encode_seconds"), 0.0)
        made.append(row | view | seconds | fault | stored)
    return pa.Table.from_pylist(made, stages.ENCODED)


def precompute(
    output: Path, recipe: Recipe, listed: Manifest, append: str | None = None, stop_after: int = 10**6
) -> Dataset:
    """What `graph.run` does, without Ray around the stages."""
    dataset = Dataset.open(str(output), recipe, Plan(listed, recipe.data.clips_per_shard, 1), append)
    dataset.load()
    dataset.shape_clips(unmeasured)
    missing = dataset.missing_shards()
    if missing:
        dataset.begin()
    for number in missing[:stop_after]:
        planned = encoded(dataset.plan.rows([number]).slice())
        row = stages.commit(planned, str(output), dataset.fingerprint, 1).to_pylist()[0]
        dataset.committed(json.loads(row["index"]))
    if stop_after >= len(missing):
        dataset.finish(dataset.summarize())
    return dataset


MIXED = [(64, 48, 20), (48, 64, 20), (64, 48, 20), (64, 48, 4)] * 9 + [(64, 48, 1)]


@pytest.fixture(scope="module")
def dataset(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shapes") / "dataset"
    precompute(directory, recipe, manifest(MIXED))
    return directory


def test_what_a_dataset_says_of_its_shapes(dataset: Path, recipe: Recipe) -> None:
    info, index = json.loads((dataset / "dataset.json").read_text()), DatasetIndex.load(str(dataset))
    assert (info["frames"], info["size"], info["latent_shape"]) == (6, [32, 48], [6, 4, 4, 6])
    assert info["shapes"] == [
        {"frames": 6, "size": [32, 48], "samples": 18},
        {"frames": 6, "size": [48, 32], "samples": 9 - 1},  # clip-17
        {"frames": 3, "size": [32, 48], "samples": 10 - 2},  # clip-7 and clip-27; too short is for the decoder to say
    ]
    assert [pixels(shape) for shape in index.latent_shapes] == [WIDE, TALL, SHORT]
    assert sum(index.of_shape(shape).samples_of_shards.sum() for shape in index.latent_shapes) == info["samples"] == 34
    assert verify(str(dataset), recipe, 0)["samples"] == 34


def test_a_stopped_run_goes_on_with_its_plan_whatever_columns_say(
    dataset: Path, recipe: Recipe, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    for _ in range(20):
        made = precompute(again, recipe, manifest(MIXED), stop_after=2)
        if not made.missing_shards():
            break
    precompute(again, recipe, manifest(MIXED))
    assert digests(again) == digests(dataset)
    reopened = Dataset.open(str(again), recipe, Plan(manifest(MIXED), 4, 1))
    assert reopened.plan.kinds is not None  # from parts/, without a look at columns or files
    (again / "parts/part-000000.parquet").unlink()
    with pytest.raises(InputError, match=r"part-000000.parquet: is missing"):
        Dataset.open(str(again), recipe, Plan(manifest(MIXED), 4, 1))


def test_an_append_is_shaped_and_older_shards_stay(dataset: Path, recipe: Recipe, tmp_path: Path) -> None:
    grown = tmp_path / "grown"
    precompute(grown, recipe, manifest(MIXED))
    before = digests(grown)
    more = manifest([(48, 64, 20), (64, 48, 20)] * 3, len(MIXED))
    precompute(grown, recipe, more, append="skip", stop_after=1)
    precompute(grown, recipe, more)
    after, info = digests(grown), json.loads((grown / "dataset.json").read_text())
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"dataset.json", "index.parquet"}
    assert [one["samples"] for one in info["shapes"]] == [18 + 3, 8 + 3 - 1, 8]
    assert verify(str(grown), recipe, 0)["samples"] == info["samples"]


class Killed(BaseException):
    pass


def test_appends_that_are_killed_at_any_write_end_in_the_same_bytes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = [MIXED[:10], [(48, 64, 20), (64, 48, 4), (64, 48, 20)] * 3, [(64, 48, 4)]]
    firsts = [0, 10, 19]
    left = [math.inf]

    def killing(write: Any) -> Any:
        def wrapped(*args: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return write(*args, **named)

        return wrapped

    for name in ("write_bytes", "write_json"):
        monkeypatch.setattr(storage, name, killing(getattr(storage, name)))
    for name, kills in (("undisturbed", False), ("killed", True)):
        for extents, first in zip(lists, firsts, strict=True):
            for writes in itertools.count(0) if kills else [math.inf]:
                left[0] = writes
                try:
                    precompute(tmp_path / name, recipe, manifest(extents, first), append="skip" if first else None)
                    break
                except Killed:
                    if first and "appending" not in json.loads((tmp_path / name / "dataset.json").read_text()):
                        verify(str(tmp_path / name), recipe, 0)  # it is what it was
            assert writes > 3
    assert digests(tmp_path / "killed") == digests(tmp_path / "undisturbed")
    assert verify(str(tmp_path / "killed"), recipe, 0)["samples"] == 10 - 1 + 9 - 1 + 1


def test_refused_clips_are_tried_again_in_shards_of_one_shape(dataset: Path, recipe: Recipe) -> None:
    opened = Dataset.open(str(dataset), recipe, Plan(manifest(MIXED), 4, 1))
    opened.load()
    rows = opened.rows_to_retry(opened.retryable("missing"))
    table = rows.slice().to_pylist()
    assert sorted(row["clip_id"] for row in table) == ["clip-17", "clip-27", "clip-7"]
    by_shard: dict[int, set[tuple[int, ...]]] = {}
    for row in table:
        by_shard.setdefault(row["shard"], set()).add(tuple(row["video_shape"]))
    assert all(len(shapes) == 1 for shapes in by_shard.values())
    assert sorted(by_shard) == list(range(max(opened.records) + 1, max(opened.records) + 3))


def test_fields_have_the_shapes_of_their_samples(recipe: Recipe, tmp_path: Path) -> None:
    rows = []
    for number, (frames, height, width) in enumerate([(20, 48, 64), (20, 64, 48), (4, 48, 64)]):
        write_video(tmp_path / f"{number}.mp4", film(str(number), frames, height, width), 25)
        rows.append({"uri": f"{number}.mp4", "width": width, "height": height, "num_frames": frames})
    with_fields = override(recipe, ['data.fields=["first_frame","frames","flow"]'])
    made = Dataset.open(str(tmp_path / "output"), with_fields, Plan(rows_of(tmp_path, ".csv", rows), 4, 1))
    made.load()
    made.shape_clips(unmeasured)
    data, encoder = recipe.data, stages.Encoder(recipe.data, recipe.encoders.vae, "mode", "float32")
    for number in made.missing_shards():
        decoded = stages.decode(made.plan.rows([number]).slice(), data)
        stages.commit(encoder(stages.score(decoded, data)), made.uri, made.fingerprint, 1)
    todo = pa.Table.from_pylist([{"shard": k, "fields": list(with_fields.data.fields)} for k in range(3)], fields.TODO)
    for row, shape in zip(fields.read(todo, made.uri, with_fields).to_pylist(), data.shapes, strict=True):
        frames, *size = shape
        assert (row["faults"], row["size"]) == ([None], size)
        assert Image.open(io.BytesIO(row["first_frame"][0])).size == (size[1], size[0])
        assert Image.open(io.BytesIO(row["frames"][0])).size == (size[1], frames * size[0])
        assert np.load(io.BytesIO(row["flow"][0])).shape == (frames - 1, 2, size[0] // 8, size[1] // 8)
    alone = with_fields.of_shape(data.shapes[0])
    assert fields.identity("flow", with_fields)[0] != fields.identity("flow", alone)[0]
    assert fields.identity("text_states", with_fields)[0] == fields.identity("text_states", alone)[0]


# --- a training on it ------------------------------------------------------------------------------------------------


def data_of(dataset: Path | str, recipe: Recipe, rank: int = 0, world: int = 1, *more: str) -> TrainingData:
    train = override(recipe, ["train.workers=1", "train.lanes=4", "train.global_batch=4", "train.micro_batch=4", *more])
    index = DatasetIndex.load(str(dataset))
    return TrainingData([Source(str(dataset))], [index], [[(0, len(index.shards))]], train.train, rank, world)


STEPS = 40


def shape_of(samples: list[LatentSample]) -> tuple[int, ...]:
    (shape,) = {sample.latents_FCHW.shape for sample in samples}
    return tuple(shape)


def test_batches_are_of_one_shape_on_every_rank_and_any_number_of_ranks_sees_the_same(
    dataset: Path, recipe: Recipe
) -> None:
    whole = [data_of(dataset, recipe).loader.batch(step) for step in range(STEPS)]
    shapes = [shape_of(batch.samples) for batch in whole]
    assert set(Counter(shapes)) == set(DatasetIndex.load(str(dataset)).latent_shapes)
    for world in (2, 4):
        ranks = [data_of(dataset, recipe, rank, world).loader for rank in range(world)]
        for step in reversed(range(STEPS)):  # any step, without those before it
            got = [rank.batch(step) for rank in ranks]
            assert tuple(key for batch in got for key in batch.keys) == whole[step].keys
            assert {shape_of(batch.samples) for batch in got} == {shapes[step]}
            assert [epoch for batch in got for epoch in batch.epochs or []] == whole[step].epochs
    log = {step: list(batch.keys) for step, batch in enumerate(whole)}
    assert list(_against_index(data_of(dataset, recipe).loader, log, STEPS)) == []
    log[3], log[4] = log[4], log[3]
    assert list(_against_index(data_of(dataset, recipe).loader, log, STEPS))


@given(st.data())
@settings(max_examples=40)
def test_every_sample_comes_once_in_each_epoch_and_shapes_keep_pace(dataset: Path, recipe: Recipe, data: Any) -> None:
    seed, lanes = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 2, 4]))
    made = data_of(dataset, recipe, 0, 1, f"train.seed={seed}", f"train.lanes={lanes}").loader
    steps = data.draw(st.integers(1, 60))
    seen: Counter[tuple[int, int, int, int]] = Counter()
    turns: Counter[int] = Counter()
    for step in range(steps):
        places = made.places(step)
        turns[places[0].source] += 1
        assert len({one.source for one in places}) == 1
        seen.update((one.source, one.place.epoch, one.place.shard, one.place.index) for one in places)
    assert set(seen.values()) == {1}
    total = sum(loader.order.samples for loader in made.loaders)
    for source, loader in enumerate(made.loaders):
        assert abs(turns[source] - steps * loader.order.samples / total) < len(made.loaders)
        finished = loader.order.epoch_before(made.read_before(steps, source))
        by_epoch = Counter(key[1] for key in seen if key[0] == source)
        assert all(by_epoch[epoch] == loader.order.samples for epoch in range(finished))
        assert made.epoch(steps, source) in (finished, finished + 1)


def test_held_out_and_filtered_samples_are_not_seen(dataset: Path, recipe: Recipe) -> None:
    index = DatasetIndex.load(str(dataset))
    held_out = set()
    for shard in index.shards[-2:]:
        held_out |= set(storage.read_json(shards.record_uri(str(dataset), shard))["members"]["keys"])
    made = data_of(dataset, recipe, 0, 1, "train.held_out_shards=2", 'train.where="ssim < 0.8"')
    seen = [sample for step in range(STEPS) for sample in made.loader.batch(step).samples]
    assert held_out.isdisjoint(sample.key for sample in seen)
    assert max(sample.ssim for sample in seen) < 0.8
    assert sum(loader.order.samples for loader in made.loader.loaders) == len({sample.key for sample in seen})
    assert [line.split(":")[0].split("%")[-1] for line in made.lines()][-1] == " of steps"


def test_a_shape_whose_shards_are_all_damaged_stops_nothing(dataset: Path, recipe: Recipe, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    index = DatasetIndex.load(str(copy))
    for shard in index.of_shape(index.latent_shapes[1]).shards:
        Path(shards.tar_uri(str(copy), shard)).unlink()
    whole = data_of(dataset, recipe).loader
    skipping = data_of(copy, recipe, 0, 1, "train.on_damaged=skip").loader
    for step in range(STEPS):
        batch, expected = skipping.batch(step), whole.batch(step)
        lost = shape_of(expected.samples) == index.latent_shapes[1]
        assert batch.keys == (() if lost else expected.keys)
        assert (batch.step, batch.epoch, batch.epochs) == (step, expected.epoch, expected.epochs)
        assert len(batch.samples) == len(expected.samples)
        assert len(shape_of(batch.samples)) == 4  # of one shape, whichever
    with pytest.raises(Damaged, match="No such file"):
        [data_of(copy, recipe).loader.batch(step) for step in range(STEPS)]


def test_an_append_that_was_killed_while_it_measured_leaves_a_sound_dataset(
    dataset: Path, recipe: Recipe, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    (copy / ".lock.json").write_text("{}")
    (copy / ".shapes").mkdir()
    (copy / ".shapes/0123.npy").touch()
    assert verify(str(copy), recipe, 0)["samples"] == 34
    precompute(copy, recipe, manifest(MIXED))
    assert not (copy / ".shapes").exists()


def test_what_cannot_be_is_refused_in_one_line(dataset: Path, recipe: Recipe, tmp_path: Path) -> None:
    index = DatasetIndex.load(str(dataset))
    twice = [Source(str(dataset)), Source(str(dataset))]
    with pytest.raises(InputError, match="have several shapes, which a mix cannot have"):
        TrainingData(twice, [index] * 2, [[(0, len(index.shards))]] * 2, recipe.train)
    grown = tmp_path / "grown"
    precompute(grown, recipe, manifest(MIXED))
    running = data_of(grown, recipe)
    precompute(grown, recipe, manifest([(48, 64, 20)] * 3, len(MIXED)), append="skip")
    (news,) = running.follow(1, 3)
    assert "goes on without the new ones: samples of several shapes are dealt out when a training begins" in news.text


def test_recipes_refuse_shapes_that_their_networks_cannot_make(recipe: Recipe) -> None:
    assert recipe.of_shape(SHORT).data.shapes == (SHORT,)
    for wrong in ("[[6, 32, 48]]", "[[1, 32, 48]]", "[[6, 30, 48]]", "[[5, 32, 48], [5, 32, 48]]"):
        with pytest.raises(InputError, match="other_shapes"):
            override(recipe, [f"data.other_shapes={wrong}"])
