"""Turn a manifest of clips (or a folder of videos) into a dataset of latents.

A run that was stopped continues where it was when the same command is given again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from cinemo import cli
from cinemo.data.manifest.presets import PRESETS
from cinemo.data.precompute.prices import Prices, read_prices
from cinemo.progress import doing, say


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--manifest",
        help="clips: a .parquet, .csv, .tsv, .jsonl or .json file, WebDataset .tar, a glob or a directory of such, "
        "or a folder of videos with captions beside them",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help=f"what the columns of a table mean: {', '.join(PRESETS)}, or clip_id=videoid "
        "uri='videos/{page_dir}/{videoid}.mp4' caption=name start=COLUMN end=COLUMN; each=COLUMN,COLUMN where lists in "
        "a row are clips",
    )
    parser.add_argument(
        "--file-names-as-captions", action="store_true", help="go on where a folder has no captions for some videos"
    )
    parser.add_argument("--output", required=True, metavar="URI", help="directory of the dataset, local or s3://")
    parser.add_argument("--plan", action="store_true", help="only measure a few clips and say what a run will cost")
    parser.add_argument(
        "--prices", metavar="FILE", help=f"with --plan: JSON of prices ({', '.join(Prices.model_fields)})"
    )
    parser.add_argument(
        "--on",
        nargs="+",
        metavar="NODESxCORES[+COUNTxACCELERATOR]",
        help="with --plan: the nodes to plan for, such as 10x32+1xL40S-48GB, or 4x64 2x32+8xH100-80GB of two kinds",
    )
    parser.add_argument(
        "--mfu", type=float, metavar="SHARE", help="with --plan: share of an accelerator's peak that encoding reaches"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N clips only")
    parser.add_argument(
        "--retry-quarantine",
        nargs="?",
        const="",
        metavar="REASON",
        help="try refused clips of a finished dataset again: those refused for REASON, or all",
    )
    cli.add_break_lock(parser)
    parser.add_argument(
        "--append",
        nargs="?",
        const="skip",
        choices=("skip", "refuse"),
        help="extend a finished dataset by the clips of --manifest that it does not have, as new shards behind the old "
        "ones; those that it has are left out (skip, which --append alone means) or refused; changed rows are refused",
    )
    parser.add_argument("--verify", action="store_true", help="only check a finished dataset (needs no --manifest)")
    parser.add_argument("--sample", type=int, default=8, metavar="N", help="samples that --verify encodes again")
    arguments = parser.parse_args(argv)
    for name in ("prices", "on", "mfu"):
        if getattr(arguments, name) is not None and not arguments.plan:
            parser.error(f"--{name} only works with --plan")
    if arguments.append and arguments.retry_quarantine is not None:
        parser.error("--append and --retry-quarantine: give one of them")
    recipe = cli.recipe_of(arguments)
    if arguments.verify:
        with cli.libraries():
            from cinemo.data.dataset.verify import sentences, verify

        print(*sentences(verify(arguments.output, recipe, arguments.sample)), sep="\n")
        return
    if arguments.manifest is None:
        parser.error("the following arguments are required: --manifest")
    with cli.libraries():
        from cinemo.data.manifest.columns import Columns
        from cinemo.data.precompute.wording import plan_lines, summary_lines

    columns = Columns.parse(arguments.columns) if arguments.columns else None

    if arguments.plan:
        with cli.libraries():
            from cinemo.data.precompute.estimate import plan_only
            from cinemo.data.precompute.nodes import parse_machines

        prices = read_prices(arguments.prices) if arguments.prices else None
        machines = parse_machines(arguments.on) if arguments.on else None
        plan = plan_only(
            recipe,
            arguments.manifest,
            arguments.output,
            arguments.limit,
            prices,
            columns,
            arguments.file_names_as_captions,
            arguments.append,
            machines,
            arguments.mfu,
        )
        print(*plan_lines(plan, arguments.output), sep="\n")
        return
    with cli.libraries():
        from cinemo.data.precompute.graph import run
        from cinemo.data.precompute.tracker import tracked

    with tracked(recipe, arguments.output) as tracker:
        summary = run(
            recipe,
            arguments.manifest,
            arguments.output,
            arguments.limit,
            arguments.retry_quarantine,
            tracker,
            columns,
            arguments.file_names_as_captions,
            arguments.break_lock,
            arguments.append,
        )
        with doing("drawing the report"):
            page = write_report(summary)
            if tracker:
                tracker.close(summary, page)
    print(*summary_lines(summary), sep="\n")


def write_report(summary: dict[str, Any]) -> str | None:
    """``report.html`` beside the dataset; a machine that only decodes need not have what draws it."""
    if importlib.util.find_spec("matplotlib") is None:
        say("report.html is left out: matplotlib is not installed (pip install 'cinemo[report]')")
        return None
    from cinemo.evaluation.dataset_report import write_dataset_report

    return write_dataset_report(summary["output"], summary)


if __name__ == "__main__":
    cli.run(main)
