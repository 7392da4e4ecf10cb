"""The first videos of a replica are nobody's: they make kernels, plans and memory pools before it counts as ready."""

from __future__ import annotations

import numpy as np

from cinemo.animate import AnimateRequest, blank_inputs
from cinemo.bundle import ModelBundle
from cinemo.serving.engine.sampling import SamplingEngine
from cinemo.types import RunError


def warm_up(bundle: ModelBundle, max_batch: int) -> None:
    """Animate one step, to the finished frames, with one job and with ``max_batch`` jobs in a batch.

    A bundle that is compiled or runs on an accelerator sees every size between too: each is planned by itself there.

    Raises:
        RunError: the model does not fit or makes no finite numbers.
    """
    for name, about in bundle.method.inputs.items():
        if about.required and about.kind == "video":
            raise RunError(f"bundle {bundle.location}: its method needs a video ({name}), which a server does not take")
    every = bundle.device.type != "cpu" or bundle.recipe.compile
    height, width = bundle.recipe.data.size
    picture, inputs = np.full((height, width, 3), 128, np.uint8), blank_inputs(bundle.recipe)
    for size in range(1, max_batch + 1) if every else sorted({1, max_batch}):
        engine = SamplingEngine(bundle, max_batch=size)
        waiting = {f"warm-up {number}" for number in range(size)}
        for number, key in enumerate(sorted(waiting)):
            engine.join(key, AnimateRequest(picture, "warm-up", inputs=inputs, steps=1, seed=number), previews=True)
        while waiting:
            outcome = engine.step()
            for code, message in outcome.failed.values():
                raise RunError(f"bundle {bundle.location}: warm-up with {size} jobs at a time: {code}: {message}")
            waiting -= outcome.finished.keys()
