"""Many videos in one batch: each is what it would be alone, whoever comes, goes or breaks beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_bundle
from torch import Tensor

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import ModelBundle, load_bundle
from cinemo.diffusion.guidance import Query, Sampling
from cinemo.serving.engine.sampling import Outcome, SamplingEngine
from cinemo.types import Animation, Condition, InputError

PICTURE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
# Rounding differs with the size of a batch; the random network and guidance make more of it at every step.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return load_bundle(tiny_bundle(tmp_path_factory.mktemp("tiny")), "cpu")


def ask(**controls: Any) -> AnimateRequest:
    return AnimateRequest(**({"image": PICTURE, "prompt": "waves"} | controls))


def run(engine: SamplingEngine, most: int = 500) -> Outcome:
    """Step until nothing is left; progress is the last of each."""
    whole = Outcome()
    for _ in range(most):
        if not len(engine):
            return whole
        outcome = engine.step()
        whole.progress.update(outcome.progress)
        whole.finished.update(outcome.finished)
        whole.failed.update(outcome.failed)
    raise AssertionError(f"{len(engine)} videos did not end in {most} steps")


def assert_same(got: Animation, alone: Animation) -> None:
    torch.testing.assert_close(got.latents_CFHW, alone.latents_CFHW, **TOLERANCE)
    assert np.abs(got.frames_FHWC.astype(int) - alone.frames_FHWC.astype(int)).max() <= 1
    assert (got.fps, got.settings) == (alone.fps, alone.settings)


def test_videos_of_several_shapes_take_turns_in_calls_of_their_own(bundle: ModelBundle) -> None:
    requests = {
        "wide": ask(),
        "upright": ask(size=(48, 32)),
        "odd": ask(size=(24, 40)),
        "again": ask(size=(48, 32), reuse_features=2),
    }
    engine = SamplingEngine(bundle, max_batch=4)
    for key, request in requests.items():
        engine.join(key, request)
    outcome = run(engine)
    assert not outcome.failed
    for key, request in requests.items():
        assert_same(outcome.finished[key], animate(bundle, request))
    assert outcome.finished["upright"].frames_FHWC.shape[1:3] == (48, 32)


REQUESTS = st.builds(
    dict,
    prompt=st.sampled_from(["waves", "snow falls", ""]),
    negative_prompt=st.sampled_from(["", "blur"]),
    motion_bucket=st.sampled_from([0, 7, 19]),
    steps=st.integers(2, 7),
    guidance_scale=st.sampled_from([1.0, 2.0, 7.5]),
    seed=st.integers(0, 3),
    dct_init=st.booleans(),
    solver=st.sampled_from(["ddim", "multistep"]),
    guidance_interval=st.sampled_from([(0.0, 1.0), (0.3, 0.7)]),
    reuse_features=st.integers(1, 3),
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(REQUESTS, st.integers(0, 4), st.sampled_from([None, None, None, 1, 3])), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(0, 1),
)
def test_any_company_leaves_a_result_as_it_is_alone(
    bundle: ModelBundle, plan: list[tuple[dict[str, Any], int, int | None]], max_batch: int, ahead: int
) -> None:
    """Jobs join at any step and may leave after some: those that stay end as `animate` ends them."""
    engine, steps = SamplingEngine(bundle, max_batch, ahead), 0
    finished: dict[str, Animation] = {}
    seen: dict[str, list[int]] = {str(k): [] for k in range(len(plan))}
    while steps < 5 or len(engine):
        for k, (controls, begins, leaves) in enumerate(plan):
            if begins == steps:
                assert engine.join(str(k), ask(**controls)) == controls["steps"]
            if leaves is not None and begins + leaves == steps:
                engine.leave(str(k))
        outcome = engine.step()
        assert not outcome.failed
        assert len(outcome.progress) <= max_batch
        for key, (done, of) in outcome.progress.items():
            seen[key].append(done)
            assert of == plan[int(key)][0]["steps"]
        finished |= outcome.finished
        steps += 1
    for k, (controls, _, leaves) in enumerate(plan):
        if str(k) in finished:
            assert seen[str(k)] == list(range(1, controls["steps"] + 1)), "every step is reported once, in order"
            assert_same(finished[str(k)], animate(bundle, ask(**controls)))
        else:
            assert leaves is not None, "only one that left does not end"


def test_a_short_job_ends_before_a_long_one_that_began_earlier(bundle: ModelBundle) -> None:
    for max_batch in (1, 2):
        engine, order = SamplingEngine(bundle, max_batch), []
        engine.join("long", ask(steps=30))
        engine.step()
        engine.join("short", ask(steps=3))
        while len(engine):
            order += list(engine.step().finished)
        assert order == ["short", "long"]


def test_turns_are_fair_with_more_jobs_than_places(bundle: ModelBundle) -> None:
    engine = SamplingEngine(bundle, max_batch=2)
    for k in range(5):
        engine.join(str(k), ask(steps=20, seed=k))
    done: dict[str, int] = {}
    for _ in range(15):
        done |= {key: at for key, (at, _) in engine.step().progress.items()}
        assert max(done.values()) - min(done.get(str(k), 0) for k in range(5)) <= 1
    assert done == {str(k): 6 for k in range(5)}


@contextmanager
def network_hook(bundle: ModelBundle, hook: Callable[..., Any]) -> Iterator[list[int]]:
    """``hook(rows, timesteps, motion_ids, output)`` may change the network's output; the sizes of all batches."""
    sizes: list[int] = []

    def called(_: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        sizes.append(len(inputs[0]))
        changed: Tensor | None = hook(inputs[0], inputs[1], inputs[3], output)
        return changed

    handle = bundle.method.unet.register_forward_hook(called)
    try:
        yield sizes
    finally:
        handle.remove()


def test_a_cancelled_job_frees_its_rows_at_the_next_step(bundle: ModelBundle) -> None:
    engine = SamplingEngine(bundle, max_batch=4)
    for key in ("a", "b", "c"):
        engine.join(key, ask(steps=5))
    with network_hook(bundle, lambda *_: None) as sizes:
        engine.step()
        engine.leave("b")
        outcome = engine.step()
    assert sizes == [6, 4]
    assert set(outcome.progress) == {"a", "c"}
    assert set(run(engine).finished) == {"a", "c"}
    engine.leave("b")


def test_rows_stand_at_their_own_timesteps(bundle: ModelBundle) -> None:
    engine, seen = SamplingEngine(bundle), []
    engine.join("a", ask(steps=4, guidance_scale=1.0))
    engine.step()
    engine.join("b", ask(steps=10))
    with network_hook(bundle, lambda x, t, *_: seen.append(t.tolist())):
        engine.step()
        engine.step()
    assert seen == [[501, 901, 901], [251, 801, 801]]


@pytest.mark.parametrize("ahead", [0, 1])
def test_not_a_number_fails_its_own_job_alone(bundle: ModelBundle, ahead: int) -> None:
    def poison(x: Tensor, t: Tensor, motion_ids: Tensor, output: Tensor) -> Tensor:
        return output.masked_fill(((motion_ids == 13) & (t < 600)).view(-1, 1, 1, 1, 1), float("nan"))

    engine = SamplingEngine(bundle, ahead=ahead)
    requests = {"good": ask(steps=6), "bad": ask(steps=6, motion_bucket=13), "too": ask(steps=9, seed=4)}
    alone = {key: animate(bundle, requests[key]) for key in ("good", "too")}
    for key, request in requests.items():
        engine.join(key, request)
    with network_hook(bundle, poison) as sizes:
        outcome = run(engine)
    assert outcome.failed["bad"][0] == "not_finite"
    assert "step 3" in outcome.failed["bad"][1]
    assert outcome.progress["bad"] == (2, 6)
    assert set(outcome.finished) == {"good", "too"}
    assert sizes[:3] == [6] * 3
    assert sizes[3 + ahead] == 4, "its rows are free at the step after it was seen"
    for key, expected in alone.items():
        assert_same(outcome.finished[key], expected)


def test_not_a_number_in_the_last_step_is_no_video(bundle: ModelBundle) -> None:
    for ahead in (0, 1):
        engine = SamplingEngine(bundle, ahead=ahead)
        engine.join("bad", ask(steps=3))
        with network_hook(bundle, lambda x, t, m, output: output * float("nan") if int(t[0]) == 1 else None):
            outcome = run(engine)
        assert outcome.failed["bad"][0] == "not_finite"
        assert not outcome.finished


def test_a_batch_too_large_for_memory_is_tried_one_by_one(bundle: ModelBundle) -> None:
    def memory(rows: int) -> Callable[..., None]:
        def check(x: Tensor, *_: Any) -> None:
            if len(x) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

        return check

    requests = {str(k): ask(steps=4, seed=k, reuse_features=1 + k // 2) for k in range(4)}
    engine = SamplingEngine(bundle, max_batch=4)
    for key, request in requests.items():
        engine.join(key, request)
    with network_hook(bundle, memory(4)) as sizes:
        outcome = run(engine)
    assert not outcome.failed
    assert sizes[:6] == [8, 2, 2, 2, 2, 4], "the next batches are small enough"
    assert sizes.count(8) == 1
    for key, request in requests.items():
        assert_same(outcome.finished[key], animate(bundle, request))

    engine.join("single", ask(steps=4, guidance_scale=1.0))
    engine.join("double", ask(steps=4))
    with network_hook(bundle, memory(1)):
        outcome = run(engine)
    assert outcome.failed["double"][0] == "out_of_memory"
    assert "Tried" not in outcome.failed["double"][1]
    assert set(outcome.finished) == {"single"}
    assert set(outcome.failed) == {"double"}


def broken_sampler() -> Sampling:
    sampling = broken_sampling()
    next(sampling)
    return sampling


def broken_sampling() -> Sampling:
    yield Query(torch.zeros(1), 1, Condition())
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_fault_of_the_sampler_or_the_decoder_is_its_own_jobs(
    bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = SamplingEngine(bundle)
    for key in ("a", "b"):
        engine.join(key, ask(steps=4))
    broken = engine._videos["a"]
    broken.asked = replace(broken.asked, sampling=broken_sampler())
    outcome = run(engine)
    assert set(outcome.finished) == {"b"}
    assert outcome.failed["a"][0] == "out_of_memory"

    decode, calls = bundle.decoder.decode_piece, []

    def breaks(latents: Tensor) -> Tensor:
        calls.append(len(latents))
        if len(calls) <= 2:
            raise RuntimeError("a secret path /etc/x")
        return decode(latents)

    monkeypatch.setattr(bundle.decoder, "decode_piece", breaks)
    for key in ("a", "b"):
        engine.join(key, ask(steps=2))
    outcome = run(engine)
    assert set(outcome.finished) == {"b"}
    assert outcome.failed == {"a": ("internal_error", "the server failed to make this video; the error was logged")}
    assert "secret path" in caplog.text


def test_a_lost_device_ends_the_denoiser(bundle: ModelBundle) -> None:
    def lose(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    engine = SamplingEngine(bundle)
    engine.join("a", ask())
    with network_hook(bundle, lose), pytest.raises(torch.AcceleratorError):
        engine.step()


def test_a_source_video_and_bad_settings_are_refused(bundle: ModelBundle) -> None:
    engine = SamplingEngine(bundle)
    with pytest.raises(InputError, match="source"):
        engine.join("a", ask(inputs={"source": np.repeat(PICTURE[None], 6, 0)}))
    with pytest.raises(InputError, match="steps is 1"):
        engine.join("a", ask(solver="multistep", steps=1))
    assert len(engine) == 0
    assert engine.step() == Outcome()


@pytest.mark.parametrize("way", ["phased", "windows", "chain"])
def test_a_long_video_shares_its_batches_with_short_ones(bundle: ModelBundle, way: str) -> None:
    long, short = ask(frames=50, long_video=way, steps=5), ask(steps=3)
    engine, order = SamplingEngine(bundle, 2), []
    calls = engine.join("long", long)
    progress: list[tuple[int, int]] = []
    for turn in range(200):
        if turn in (2, 4):
            engine.join(f"short-{turn}", short)
        outcome = engine.step()
        assert not outcome.failed
        progress += [step for key, step in outcome.progress.items() if key == "long"]
        order += outcome.finished
        for key, made in outcome.finished.items():
            assert_same(made, animate(bundle, long if key == "long" else short))
        if not len(engine):
            break
    assert order == ["short-2", "short-4", "long"]
    assert progress == [(done, calls) for done in range(1, calls + 1)]
