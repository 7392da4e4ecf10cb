"""Train the base UNet that ships with the package and that `cinemo-tiny` starts from, as the paper starts from LaVie.

render -> precompute -> train from scratch -> export -> unet/ (half precision). Stopped, it goes on.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from cinemo import cli
from cinemo.types import InputError

VIEWS = 4


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, recipe=None)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where unet/ and the stages go")
    parser.add_argument("--count", type=int, default=1600, help="clips to render")
    parser.add_argument("--clips", type=Path, metavar="DIR", help="folder of real videos to use beside them")
    parser.add_argument("--hold-out", action="append", default=[], metavar="NAME", help="file not to use; repeat")
    parser.add_argument("--repeats", type=int, default=30, help=f"times {VIEWS} samples of each real video")
    parser.add_argument("--max-steps", type=int, default=4000, help="training steps of 8 samples")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: where the CPU is good at it"
    )
    parser.add_argument("--seed", type=int, default=101, help="of clips and training; the demo's clips have another")
    arguments = parser.parse_args(argv)
    if min(arguments.count, arguments.repeats, arguments.max_steps) < 1:
        raise InputError("--count, --repeats and --max-steps: expected numbers above 0")

    from cinemo.evaluation.stages import Stages  # late: --help and bad flags need none of it
    from cinemo.training.encoders.frames import clip_files

    real = clip_files(arguments.clips, arguments.hold_out)[0] if arguments.clips else []

    output = arguments.output
    stages = Stages(output, Path(__file__).resolve().parent)
    rendered, dataset, run, bundle = (output / name for name in ("rendered", "dataset", "run", "bundle"))
    words = [
        stages.note("precompute", "precompute", "--manifest", output / "manifest.jsonl", "--output", dataset,
                    "--set", f"data.views={VIEWS}", "--set", "data.encode_actors=2"),
        stages.note("train", "train", "--data", dataset, "--output", run, "--max-steps", arguments.max_steps,
                    "--set", "train.init=null", "--set", "train.lr=1.5e-3", "--set", f"train.seed={arguments.seed}",
                    "--set", "train.checkpoint_every=500", "--set", "train.sample_every=500",
                    "--set", f"train.precision={arguments.precision}"),
        stages.note("export", "export", "--checkpoint", run, "--output", bundle),
    ]  # fmt: skip

    def render() -> None:
        from cinemo.media.synthetic import render_clips

        rows = [json.loads(line) for line in render_clips(rendered, arguments.count, arguments.seed).open()]
        rows = [row | {"uri": f"rendered/{row['uri']}"} for row in rows]
        for path in real:
            row = {"uri": str(path.resolve()), "caption": " ".join(path.stem.split("_"))}
            rows += [row | {"clip_id": f"{path.stem}-{turn:03d}"} for turn in range(arguments.repeats)]
        (output / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    inputs = [arguments.count, arguments.seed, str(arguments.clips), arguments.hold_out, arguments.repeats]
    stages.run("render", inputs, ["rendered", "manifest.jsonl"], render)
    stages.run("precompute", [], ["dataset"], lambda: stages.command("precompute", words[0]))
    stages.run("train", [arguments.max_steps, arguments.precision], ["run"], lambda: stages.command("train", words[1]))
    stages.run("export", [], ["bundle"], lambda: stages.command("export", words[2]))

    from cinemo.bundle import load_bundle
    from cinemo.networks.weights import save_unet

    save_unet(load_bundle(bundle).method.unet.half(), output / "unet")
    with (run / "loss.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    tenth = max(1, len(losses) // 10)
    facts = {
        "seconds": stages.seconds,
        "samples": json.loads((dataset / "dataset.json").read_text())["samples"],
        "loss, first tenth": round(sum(losses[:tenth]) / tenth, 4),
        "loss, last tenth": round(sum(losses[-tenth:]) / tenth, 4),
    }
    (output / "unet" / "made.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{output / 'unet'}: {json.dumps(facts)}")


if __name__ == "__main__":
    cli.run(main)
