"""Measure a bundle: on samples of a dataset or pictures of a folder (metrics.json, calibration.json and report.html),
or with --rendered on unseen rendered scenes whose true motion is known (motion.json): do its videos move as requested?

With --data or --long, a run that was stopped goes on where it was when started again with the same --output."""

from __future__ import annotations

from collections.abc import Sequence

from cinemo import cli
from cinemo.types import InputError


def main(argv: Sequence[str] | None = None) -> None:
    with cli.libraries():
        from cinemo.evaluation.evaluate import evaluate, evaluate_rendered, sentences
        from cinemo.evaluation.extractors import EXTRACTORS
        from cinemo.evaluation.knobs import write_knobs
        from cinemo.evaluation.long import write_long
        from cinemo.evaluation.measuring import Plan
        from cinemo.evaluation.protocols import PROTOCOLS, protocol_of
        from cinemo.evaluation.quality import write_quality
    parser = cli.parser(__doc__, recipe=None)
    parser.add_argument(
        "--bundle", required=True, metavar="DIR", help="folder written by pipelines/export.py, or s3://"
    )
    parser.add_argument(
        "--data",
        metavar="URI",
        help="dataset written by pipelines/precompute.py, or a folder of pictures: the prompt of boat.png is in "
        "boat.txt, or else its name; local or s3://; rendered:64: so many rendered pictures that no training has seen",
    )
    parser.add_argument(
        "--rendered", type=int, metavar="N", help="measure motion on N rendered scenes of each kind, with no dataset"
    )
    parser.add_argument(
        "--as-files",
        action="store_true",
        help="with --rendered: ask for the motion that a scene has as an mp4 file, whose compression counts as motion; "
        "for what was trained on files",
    )
    parser.add_argument(
        "--knobs",
        type=int,
        metavar="N",
        help="show on N rendered clips which choices of a protocol move a distance between sets of videos (knobs.html)",
    )
    parser.add_argument(
        "--long",
        type=int,
        metavar="FRAMES",
        help="compare every way to make videos of so many frames, on --limit rendered pictures (long.html)",
    )
    parser.add_argument(
        "--quality",
        type=int,
        metavar="N",
        help="measure on N pictures, rendered ones or those of --data, what fewer steps and other ways to do less cost "
        "(quality.json); with --into-bundle requests can then ask for a quality",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the files go, local or s3://")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="samples or pictures to measure, one video each (default: as many as --protocol has, or 4)",
    )
    parser.add_argument(
        "--pictures", type=int, default=4, metavar="N", help="of them, those that measure the control of motion"
    )
    parser.add_argument("--values", type=int, default=5, metavar="N", help="of that control, for each picture")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="videos for each picture and value")
    parser.add_argument(
        "--compare-noise", action="store_true", help="also compare the method's ways to draw its initial noise"
    )
    parser.add_argument("--steps", type=int, help="DDIM steps (default: what the bundle's recipe says)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated videos")
    parser.add_argument(
        "--against", action="append", default=[], metavar="DIR", help="another bundle to compare with; repeatable"
    )
    parser.add_argument(
        "--extractor",
        action="append",
        default=[],
        metavar="NAME=PLACE",
        help=f"weights that a metric needs, local or s3://; repeatable: {', '.join(EXTRACTORS)}",
    )
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), help="of a paper: say where this departs from it")
    parser.add_argument(
        "--without-first-frame", action="store_true", help="networks do not see the first frame, which is given"
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="of a Ray cluster that share the work; 0: this process"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument(
        "--into-bundle",
        action="store_true",
        help="also keep the calibration and the model card in the bundle: the server's page shows what was measured",
    )
    arguments = parser.parse_args(argv)
    if arguments.quality is not None and arguments.rendered is arguments.knobs is arguments.long is None:
        write_quality(
            arguments.bundle,
            arguments.output,
            arguments.quality,
            arguments.data,
            arguments.seed,
            arguments.device,
            arguments.into_bundle,
        )
        return
    if sum(each is not None for each in (arguments.data, arguments.rendered, arguments.knobs, arguments.long)) != 1:
        raise InputError(
            "--data, --rendered, --knobs and --long: expected one of them, a dataset or pictures, a number of rendered "
            "clips, or one of frames"
        )
    protocol = protocol_of(arguments.protocol) if arguments.protocol else None
    limit = arguments.limit if arguments.limit is not None else (protocol and protocol.videos) or 4
    if arguments.as_files and arguments.rendered is None:
        raise InputError("--as-files: expected beside --rendered alone, it is about rendered scenes")
    if arguments.long is not None:
        write_long(arguments.bundle, arguments.output, arguments.long, limit, arguments.steps, arguments.device)
        print(f"report: {arguments.output}/long.html")
        return
    if arguments.knobs is not None:
        write_knobs(arguments.bundle, arguments.output, arguments.knobs, tuple(arguments.extractor), arguments.device)
        print(f"report: {arguments.output}/knobs.html")
        return
    if arguments.rendered is not None:
        for name in ("against", "extractor", "workers", "into_bundle"):
            if getattr(arguments, name):
                raise InputError(
                    f"--{name.replace('_', '-')}: expected beside --data, --rendered measures one bundle alone"
                )
        evaluate_rendered(
            arguments.bundle,
            arguments.output,
            arguments.rendered,
            arguments.steps,
            arguments.seed,
            arguments.device,
            as_files=arguments.as_files,
        )
        return
    plan = Plan(
        limit=limit,
        pictures=arguments.pictures,
        values=arguments.values,
        seeds=arguments.seeds,
        steps=arguments.steps,
        seed=arguments.seed,
        noise=arguments.compare_noise,
        first_frame=not arguments.without_first_frame,
        extractors=tuple(arguments.extractor),
        protocol=protocol,
    )
    metrics = evaluate(
        arguments.bundle,
        arguments.data,
        arguments.output,
        plan,
        arguments.device,
        arguments.into_bundle,
        arguments.against,
        track=True,
        workers=arguments.workers,
    )
    print(*sentences(metrics), f"report: {arguments.output}/report.html", sep="\n")


if __name__ == "__main__":
    cli.run(main)
