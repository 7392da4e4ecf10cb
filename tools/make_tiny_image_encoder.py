"""Train the tiny image encoder that ships with the package, on rendered frames; writes it in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cinemo import cli
from cinemo.types import InputError


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, recipe=None)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where image_encoder/ goes")
    parser.add_argument("--minutes", type=float, default=6, help="training time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0:
        raise InputError("--minutes: expected a number above 0")

    import torch  # late: --help and bad flags need none of it

    from cinemo.networks.frozen import TextEncoder
    from tools.tiny_encoders.image import train_image

    torch.set_num_threads(arguments.threads)
    text = TextEncoder("package:tiny/text_encoder", "package:tiny/tokenizer")
    model, _ = train_image(arguments.minutes, arguments.seed, text, lambda line: print(line, flush=True))
    model.half().save_pretrained(arguments.output / "image_encoder")


if __name__ == "__main__":
    cli.run(main)
