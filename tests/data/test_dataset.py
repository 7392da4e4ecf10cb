"""What a stopped run finds when it is started again: the journal, records after it, and no more requests than that."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data.small_data import make_sample
from data.test_plan import clips

from cinemo import checksums, s3, storage
from cinemo.config import Recipe
from cinemo.data.dataset import identity, shards, verify
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.precompute import dataset as dataset_module
from cinemo.data.precompute import journal
from cinemo.data.precompute.dataset import Dataset
from cinemo.data.precompute.plan import Plan
from cinemo.recipes import override
from cinemo.types import InputError, Refusal

SHARDS = 17


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT", 5)
    monkeypatch.setattr(dataset_module, "_WINDOW", 4)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    request.getfixturevalue("s3_endpoint")
    return f"s3://cinemo-test/{tmp_path.name}"


@pytest.fixture(scope="module")
def undisturbed(small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a dataset that was made without a stop; the same on every storage."""
    return finished(str(tmp_path_factory.mktemp("undisturbed") / "out"), small_recipe)


def opened(output: str, recipe: Recipe) -> Dataset:
    dataset = Dataset.open(output, recipe, Plan(clips(2 * SHARDS), 2, 1))
    dataset.load()
    return dataset


def commit(dataset: Dataset, numbers: Iterator[int] | range | list[int], known: bool = True) -> None:
    """Shards of one sample and one refusal; ``known``: the driver was told before it died."""
    dataset.begin()
    for number in numbers:
        refusal = Refusal(f"clip-{2 * number + 1}", "/x.mp4", "open", "missing", "no such file")
        record = shards.commit(
            dataset.uri, number, [make_sample(2 * number)], [refusal], dataset.fingerprint, checksum=dataset.checksum
        )
        if known:
            dataset.committed(shards.index_row(record))


def files(output: str) -> dict[str, bytes]:
    found = {}
    for directory in ("", "shards", "quarantine", ".progress"):
        place = storage.join(output, directory) if directory else output
        for name in storage.names(place):
            try:
                found[f"{directory}/{name}"] = storage.read_bytes(storage.join(place, name))
            except (IsADirectoryError, FileNotFoundError):
                continue
    return found


def finished(output: str, recipe: Recipe) -> dict[str, bytes]:
    dataset = opened(output, recipe)
    commit(dataset, dataset.missing_shards())
    dataset.finish(dataset.summarize())
    return files(output)


@pytest.mark.slow
def test_a_stopped_run_finds_what_is_committed(
    output: str, small_recipe: Recipe, undisturbed: dict[str, bytes], monkeypatch: Any
) -> None:
    commit(opened(output, small_recipe), range(12))
    commit(opened(output, small_recipe), [12, 14], known=False)
    read: list[int] = []
    real = Dataset._row
    monkeypatch.setattr(Dataset, "_row", lambda self, number: read.append(number) or real(self, number))
    dataset = opened(output, small_recipe)
    assert dataset.missing_shards() == [13, *range(15, SHARDS)]
    assert min(read) == 10  # two segments of five were in the journal
    assert finished(output, small_recipe) == undisturbed
    assert ".progress/segment-000000.parquet" not in undisturbed
    assert opened(output, small_recipe).missing_shards() == []


def test_a_large_bucket_is_not_listed(s3_endpoint: str, small_recipe: Recipe, tmp_path: Path, monkeypatch: Any) -> None:
    output = f"s3://cinemo-test/{tmp_path.name}"
    monkeypatch.setattr(dataset_module, "_LOOKED_AT", 3)
    commit(opened(output, small_recipe), range(16))
    asked: list[str] = []
    real = s3.call

    def watch(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
        asked.append(f"{method} {uri.rsplit('/', 2)[-2]}")
        return real(uri, method, *arguments, **options)

    monkeypatch.setattr(s3, "call", watch)
    assert opened(output, small_recipe).missing_shards() == list(range(16, SHARDS))
    assert not any(call.split()[0] in ("ls", "find", "glob", "walk") for call in asked)
    assert sum(call.endswith(" shards") for call in asked) <= 12


def test_a_dataset_begun_with_sha256_goes_on_with_it(
    output: str, small_recipe: Recipe, undisturbed: dict[str, bytes], monkeypatch: Any
) -> None:
    """Also its journal, whose segments an older program wrote: in the end nothing shows that there was a newer one."""
    with monkeypatch.context() as older:
        older.setattr(checksums, "DEFAULT", "sha256")
        whole = finished(f"{output}-older", small_recipe)
        commit(opened(output, small_recipe), range(12))
    segment = storage.join(output, ".progress/segment-000000.parquet")
    table = pq.read_table(io.BytesIO(storage.read_bytes(segment)))
    names = ["sha256" if name == "checksum" else name for name in table.column_names]
    stamp = table.schema.metadata[b"cinemo.dataset"].decode()
    storage.write_bytes(segment, journal._encoded(table.rename_columns(names), stamp))
    dataset = opened(output, small_recipe)
    assert (dataset.checksum, dataset.missing_shards()) == ("sha256", list(range(12, SHARDS)))
    assert dataset.journal.written == 2, "its segments are believed"
    assert finished(output, small_recipe) == whole
    assert b'"checksum"' not in whole["/dataset.json"]
    assert b'"checksum": "blake3"' in undisturbed["/dataset.json"]
    assert {name for name in whole if whole[name] != undisturbed[name]} == {
        "/dataset.json", "/index.parquet", *(f"shards/shard-{number:06d}.json" for number in range(SHARDS))
    }  # fmt: skip


def test_a_dataset_keeps_the_version_of_its_scores(output: str, small_recipe: Recipe, monkeypatch: Any) -> None:
    """It stays finished; only what would mix two versions is refused."""
    recipe = override(small_recipe, ["data.scores=true"])
    with monkeypatch.context() as before:
        before.setattr(identity, "SCORES_VERSION", 1)
        before.setattr(dataset_module, "SCORES_VERSION", 1)
        whole = finished(f"{output}-whole", recipe)
        commit(opened(output, recipe), range(12))
    assert b'"scores": 1' in whole["/dataset.json"]
    dataset = opened(f"{output}-whole", recipe)
    assert dataset.missing_shards() == []
    dataset.finish(dataset.summarize())
    assert files(f"{output}-whole") == whole
    assert verify._other_recipe(DatasetIndex.load(f"{output}-whole"), recipe, {}) == []
    for refused in (
        lambda: opened(output, recipe),
        lambda: dataset.rows_to_retry(dataset.retryable("")),
        lambda: Dataset.open(f"{output}-whole", recipe, Plan(clips(2 * SHARDS + 2), 2, 1), "skip").load(),
    ):
        with pytest.raises(InputError, match="holds scores of version 1, new shards would have version 2"):
            refused()
    with pytest.raises(InputError, match="scores is 1 there and None here"):
        opened(output, small_recipe)


@pytest.mark.slow
def test_a_lost_or_foreign_journal_costs_only_time(
    output: str, small_recipe: Recipe, undisturbed: dict[str, bytes]
) -> None:
    commit(opened(output, small_recipe), range(12))
    storage.remove_file(storage.join(output, ".progress/segment-000000.parquet"))
    assert opened(output, small_recipe).missing_shards() == list(range(12, SHARDS))
    other = storage.join(output, ".progress/segment-000000.parquet")
    table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(output, ".progress/segment-000001.parquet"))))
    storage.write_bytes(other, journal._encoded(table.replace_schema_metadata(), "another dataset"))
    assert opened(output, small_recipe).missing_shards() == list(range(12, SHARDS))
    assert finished(output, small_recipe) == undisturbed


def test_a_journal_of_a_removed_dataset_is_not_believed(
    output: str, small_recipe: Recipe, undisturbed: dict[str, bytes]
) -> None:
    commit(opened(output, small_recipe), range(16))
    storage.remove_file(storage.join(output, "dataset.json"))
    storage.remove(storage.join(output, "shards"))
    assert opened(output, small_recipe).missing_shards() == list(range(SHARDS))
    assert finished(output, small_recipe) == undisturbed


@pytest.mark.parametrize("complete", [True, False])
def test_shards_removed_by_hand_are_made_again(
    output: str, small_recipe: Recipe, undisturbed: dict[str, bytes], complete: bool
) -> None:
    if complete:
        finished(output, small_recipe)
    else:
        commit(opened(output, small_recipe), range(SHARDS - 1))
    for name in ("shard-000003.json", "shard-000007.tar"):
        storage.remove_file(storage.join(output, "shards", name))
    missing = opened(output, small_recipe).missing_shards()
    assert missing == ([3, 7] if complete else [3, 7, SHARDS - 1])
    assert finished(output, small_recipe) == undisturbed


@pytest.mark.slow
def test_a_retry_goes_on_after_a_stop(output: str, small_recipe: Recipe) -> None:
    finished(output, small_recipe)
    dataset = opened(output, small_recipe)
    refused = dataset.retryable("missing")
    assert len(refused) == SHARDS
    rows = dataset.rows_to_retry(refused)
    assert rows.slice()["clip_id"].to_pylist() == [f"clip-{2 * k + 1}" for k in range(SHARDS)]
    assert rows.shards.tolist() == [SHARDS + k // 2 for k in range(SHARDS)]
    recovered = {"clip-1": refused["clip-1"], "clip-3": refused["clip-3"]}
    shards.commit(output, SHARDS, [make_sample(1), make_sample(3)], [], dataset.fingerprint, recovered)

    again = opened(output, small_recipe)  # the driver was killed before it was told
    assert again.missing_shards() == []
    assert len(again.retryable("")) == SHARDS - 2
    summary = again.summarize()
    assert (summary["samples"], summary["quarantined"], summary["shards"]) == (SHARDS + 2, SHARDS - 2, SHARDS + 1)
    again.finish(summary)
    assert shards.read_ledger(output, 0) == []
    assert opened(output, small_recipe).summarize() == summary


def test_another_size_of_shard_is_another_dataset(output: str, small_recipe: Recipe) -> None:
    finished(output, small_recipe)
    with pytest.raises(ValueError, match="clips_per_shard is 2 there and 3 here"):
        Dataset.open(output, override(small_recipe, []), Plan(clips(2 * SHARDS), 3, 1))


def test_the_index_does_not_show_how_it_came_together(output: str, small_recipe: Recipe) -> None:
    dataset = opened(output, small_recipe)
    commit(dataset, range(SHARDS))
    records = [storage.read_json(shards.record_uri(output, number)) for number in range(SHARDS)]
    assert shards.index_table_bytes(dataset.journal.table()) == shards.index_bytes(records[::-1])


@pytest.mark.s3
def test_a_finished_dataset_has_no_unfinished_uploads(s3_endpoint: str, small_recipe: Recipe, tmp_path: Path) -> None:
    import boto3

    client = boto3.client("s3")
    for place in (tmp_path.name, "beside"):
        client.create_multipart_upload(Bucket="cinemo-test", Key=f"{place}/shards/shard-000001.tar")
    finished(f"s3://cinemo-test/{tmp_path.name}", small_recipe)
    left = client.list_multipart_uploads(Bucket="cinemo-test")["Uploads"]
    storage.abort_uploads("s3://cinemo-test/beside")
    assert [upload["Key"] for upload in left] == ["beside/shards/shard-000001.tar"]
