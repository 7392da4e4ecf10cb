"""Measure a bundle on samples of a dataset: metrics.json, calibration.json (motion control) and report.html."""

from __future__ import annotations

from collections.abc import Sequence

from cinemo import cli
from cinemo.evaluation.evaluate import evaluate


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, recipe=None)
    parser.add_argument(
        "--bundle", required=True, metavar="DIR", help="folder written by pipelines/export.py, or s3://"
    )
    parser.add_argument("--data", required=True, metavar="URI", help="dataset written by pipelines/precompute.py")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the three files go, local or s3://")
    parser.add_argument("--limit", type=int, default=4, metavar="N", help="samples; each costs six videos")
    parser.add_argument("--steps", type=int, help="DDIM steps (default: what the bundle's recipe says)")
    parser.add_argument("--seed", type=int, default=0, help="of the generated videos")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument(
        "--into-bundle", action="store_true", help="keep the calibration in the bundle too: the server's page shows it"
    )
    arguments = parser.parse_args(argv)
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
