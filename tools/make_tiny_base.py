"""Train the base that ships with the package and that a tiny recipe starts from, as Cinemo's paper starts from LaVie.

Renders and encodes clips, trains the recipe's networks and the text model on them, and writes unet/ (and what else the
method has), text_encoder/ and made.json.
If stopped, it continues when run again. Then `pipelines/evaluate.py --rendered` measures a bundle made with them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cinemo import cli
from cinemo.types import InputError


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where unet/ and the stages go")
    parser.add_argument("--count", type=int, default=6000, help="clips to render")
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the planned samples: 0.1 trains a tenth as long"
    )
    parser.add_argument("--batch", type=int, default=8, help="samples per step")
    parser.add_argument(
        "--seed", type=int, default=101, help="seed of clips and training; the demo's clips have another"
    )
    parser.add_argument("--processes", type=int, default=2, help="processes that render and, on a CPU, train")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--bf16", action="store_true", help="use bfloat16: for accelerators, and CPUs with AMX")
    parser.add_argument("--init", metavar="DIR", help="weights to start from, as train.init has them")
    parser.add_argument("--freeze-text", action="store_true", help="leave the text model as it is")
    parser.add_argument("--steady", action="store_true", help="only clips whose captions say how fast, or steady ones")
    parser.add_argument("--whole", action="store_true", help="all frames in every phase: some networks take no fewer")
    arguments = parser.parse_args(argv)
    if min(arguments.count, arguments.batch, arguments.processes) < 1 or arguments.share <= 0:
        raise InputError("--count, --batch, --processes and --share: expected numbers above 0")
    if arguments.batch % arguments.processes:
        raise InputError(f"--batch is {arguments.batch}, expected a multiple of --processes {arguments.processes}")
    recipe = cli.recipe_of(arguments)

    # Late: --help and bad flags need none of it.
    from tools.tiny_base import TrainSettings, make_clips, planned, steady, train_base

    def say(line: str) -> None:
        print(line, flush=True)

    clips = make_clips(arguments.output / "clips", recipe, arguments.count, arguments.seed, arguments.processes, say)
    clips = steady(clips) if arguments.steady else clips
    processes = arguments.processes if arguments.device == "cpu" else 1
    settings = TrainSettings(
        init=arguments.init,
        learn_text=not arguments.freeze_text,
        batch=arguments.batch,
        seed=arguments.seed,
        device=arguments.device,
        bf16=arguments.bf16,
        processes=processes,
    )
    phases = planned(arguments.share, recipe.data.frames if arguments.whole else None)
    made = train_base(arguments.output, recipe, clips, phases, settings, say)
    facts = made | {"clips": arguments.count, "phases": [asdict(phase) for phase in phases]}
    (arguments.output / "unet" / "made.json").write_text(json.dumps(facts, indent=2) + "\n")
    say(f"{arguments.output / 'unet'}: {json.dumps(made)}")


if __name__ == "__main__":
    cli.run(main)
