"""Measure a bundle: on samples of a dataset (metrics.json, calibration.json and report.html), or with --rendered on
unseen rendered scenes whose true motion is known (motion.json): do its videos move as requested?"""

from __future__ import annotations

from collections.abc import Sequence

from cinemo import cli
from cinemo.evaluation.evaluate import evaluate, evaluate_rendered
from cinemo.types import InputError


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, recipe=None)
    parser.add_argument(
        "--bundle", required=True, metavar="DIR", help="folder written by pipelines/export.py, or s3://"
    )
    parser.add_argument("--data", metavar="URI", help="dataset written by pipelines/precompute.py")
    parser.add_argument(
        "--rendered", type=int, metavar="N", help="measure motion on N rendered scenes of each kind, with no dataset"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the files go, local or s3://")
    parser.add_argument("--limit", type=int, default=4, metavar="N", help="samples to measure; each costs six videos")
    parser.add_argument("--steps", type=int, help="DDIM steps (default: what the bundle's recipe says)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated videos")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument(
        "--into-bundle", action="store_true", help="also keep the calibration in the bundle: the server's page shows it"
    )
    arguments = parser.parse_args(argv)
    if (arguments.data is None) == (arguments.rendered is None):
        raise InputError("--data and --rendered: expected one of them, the dataset or the number of rendered scenes")
    if arguments.rendered is not None:
        evaluate_rendered(
            arguments.bundle, arguments.output, arguments.rendered, arguments.steps, arguments.seed, arguments.device
        )
        return
    metrics = evaluate(
        arguments.bundle,
        arguments.data,
        arguments.output,
        arguments.limit,
        arguments.steps,
        arguments.seed,
        arguments.device,
        arguments.into_bundle,
    )
    for name, value in metrics["mean"].items():
        print(f"{name}: {value:.4g}")
    print(f"motion control (rank correlation of bucket and motion): {metrics['motion_spearman']}")
    print(f"report: {arguments.output}/report.html")


if __name__ == "__main__":
    cli.run(main)
