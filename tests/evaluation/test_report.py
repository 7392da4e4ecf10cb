"""The demo's page needs no other file, and the buckets it shows are the dataset's own."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import FRAMES, SIZE, write_dataset

from cinemo.data.dataset.shards import DatasetIndex
from cinemo.evaluation.demo import motion_buckets
from cinemo.evaluation.rendered import BARS
from cinemo.evaluation.report import DemoFacts, Sample, write_demo_report

SHAPE = (FRAMES, 4, SIZE[0] // 8, SIZE[1] // 8)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return DatasetIndex.load(str(write_dataset(tmp_path_factory.mktemp("dataset"), SHAPE)))


def test_motion_buckets_span_the_dataset(index: DatasetIndex, tmp_path: Path) -> None:
    assert motion_buckets(index, index.info["bucket_edges"]) == [1, 7, 13]
    still = DatasetIndex.load(str(write_dataset(tmp_path / "one", SHAPE, (1,))))
    assert motion_buckets(still, still.info["bucket_edges"]) == [13, 14, 15], "three different ones, whatever the data"


def test_the_page_holds_everything_and_escapes_what_users_wrote(index: DatasetIndex, tmp_path: Path) -> None:
    image = np.zeros((32, 48, 3), np.uint8)
    samples = [Sample(image, prompt, f"motion bucket {b}", b"mp4") for prompt in ("<b>ball</b>", "sky") for b in (1, 7)]
    figures = {name: bar for name, (_, bar) in BARS.items()} | {"clips_of_each_kind": 8}
    given = {"unexplained": 0.111, "unexplained_other_prompt": 0.888, "unexplained_other_bucket": 0.999}
    tuned = figures | {"pan_flow_gain": 0.8125, "given": given}
    facts = DemoFacts(
        motion={"base": figures | {"given": given}, "tuned": tuned}, edges=index.info["bucket_edges"],
        dataset=index, losses=[(5, 1.0), (10, 0.5)], samples=samples, sheet=Image.new("RGB", (80, 40)), served=b"mp4",
        serving={"prompt": "<i>sky</i>"}, seconds={"render": 12.0, "train": 240.0}, bundle="b" * 64,
        parameters=5_000_000,
        commands={"train": "python pipelines/train.py --data 'a b'"}, mlflow="mlflow ui",
    )  # fmt: skip
    write_demo_report(str(tmp_path / "report.html"), facts)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 5
    assert "<b>ball" not in page
    assert "<i>sky" not in page
    assert "&lt;b&gt;ball" in page
    assert "4.2 min" in page
    assert "5.0 million parameters, 48×32 pixels" in page
    assert "<td>0.700</td>" in re.sub(r' class="\w+"', "", page)
    assert "0.812" in page
    assert page.count("0.888") == 2
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]+)"', page))
    assert "higher level, more motion" in page
    assert "several levels of motion" in page

    # A method without a control of how much moves.
    alone = {
        name: {key: value for key, value in each.items() if key != "bucket_rank"} for name, each in facts.motion.items()
    }
    plain = [replace(sample, controls="") for sample in samples[::2]]
    write_demo_report(str(tmp_path / "plain.html"), replace(facts, motion=alone, samples=plain))
    page = (tmp_path / "plain.html").read_text()
    assert "higher level, more motion" not in page
    assert "no control of how much moves" in page
    assert "<th>video</th>" in page
