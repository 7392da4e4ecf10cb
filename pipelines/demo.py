"""Show the whole chain on this machine: clips -> latents -> training -> videos -> HTTP, and one page about it.

When run again with the same --output, it reuses whatever is still valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cinemo import cli
from cinemo.recipes import DEFAULT_RECIPE, RECIPES


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, recipe=None)
    tiny = [name for name in RECIPES if name.endswith("-tiny")]
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, choices=tiny, help="a recipe that suits this machine")
    parser.add_argument("--output", default="demo", metavar="DIR", help="new, empty, or an earlier demo")
    parser.add_argument("--clips", metavar="DIR", help="a folder of videos to use; without it, clips are rendered")
    parser.add_argument("--count", type=int, default=96, help="clips to render")
    parser.add_argument("--max-steps", type=int, default=100, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of clips, training and videos")
    parser.add_argument("--fresh", action="store_true", help="start over, removing what an earlier demo left there")
    arguments = parser.parse_args(argv)
    with cli.libraries():
        from cinemo.evaluation.demo import DemoSettings, run_demo
    settings = DemoSettings(arguments.recipe, arguments.clips, arguments.count, arguments.max_steps, arguments.seed)
    run_demo(Path(arguments.output), Path(__file__).resolve().parent, settings, arguments.fresh)


if __name__ == "__main__":
    cli.run(main)
