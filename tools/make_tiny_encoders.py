"""Train the tiny VAE and text model that ship with the package, and write the card with their figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cinemo import cli
from cinemo.types import InputError


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, recipe=None)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where vae/, text_encoder/ ... go")
    parser.add_argument(
        "--clips", type=Path, metavar="DIR", help="folder of real videos; without it, rendered ones only"
    )
    parser.add_argument(
        "--hold-out", action="append", default=[], metavar="NAME", help="file used only for measuring; repeatable"
    )
    parser.add_argument("--minutes", type=float, default=52, help="training time of the VAE")
    parser.add_argument("--text-minutes", type=float, default=4, help="training time of the text model")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if min(arguments.minutes, arguments.text_minutes) <= 0:
        raise InputError("--minutes and --text-minutes: expected numbers above 0")
    if arguments.clips is not None and not arguments.clips.is_dir():
        raise InputError(f"--clips {arguments.clips}: no such directory; name a folder of videos or leave it out")
    if arguments.hold_out and arguments.clips is None:
        raise InputError("--hold-out: needs --clips, the folder the held-out files are in")

    import torch  # late: --help and bad flags need none of it

    from tools.tiny_encoders.card import make_tiny_encoders

    torch.set_num_threads(arguments.threads)
    make_tiny_encoders(
        arguments.output,
        arguments.clips,
        arguments.hold_out,
        arguments.minutes,
        arguments.text_minutes,
        arguments.seed,
        lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    cli.run(main)
