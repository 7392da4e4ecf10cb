"""CLIP's tokenizer, without its network: how a text is cut into tokens, and how many of them are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cinemo.networks.weight_files import check_file
from cinemo.networks.weights import read_config, resolve
from cinemo.types import InputError

_ENDS = 2  # a start and an end token, which every text gets


class Tokenizer:
    """The tokenizer of a text encoder.

    Args:
        location: its directory.
        encoder: directory of the text encoder, whose ``config.json`` says how many tokens it has places for.

    Attributes:
        length: tokens that are read, the start and end token included.

    Raises:
        InputError: something is missing or damaged in a directory.
    """

    def __init__(self, location: str, encoder: str) -> None:
        from transformers import CLIPTokenizer

        words = check_tokenizer(location)
        config = read_config(resolve(encoder), encoder)
        try:
            self.words: Any = CLIPTokenizer.from_pretrained(words)
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise InputError(f"{location}: cannot be read as CLIPTokenizer ({reason[:300]})") from error
        positions = config.get(
            "max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings", 77)
        )
        self.length = min(int(self.words.model_max_length), int(positions))

    def ids(self, texts: Sequence[str]) -> Any:
        """Token ids (B, L), padded and cut to the full length L."""
        return self.words(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).input_ids

    def count(self, text: str) -> tuple[int, int]:
        """How many tokens a text has, and how many of those are read at most; start and end token not counted."""
        return len(self.words(text, add_special_tokens=False, verbose=False).input_ids), self.length - _ENDS

    def warning(self, text: str) -> str | None:
        """One line about a text of which the end is not read; None where all of it is."""
        used, limit = self.count(text)
        if used <= limit:
            return None
        return f"the prompt has {used} tokens, of which the text encoder reads the first {limit}; shorten it"


def check_tokenizer(location: str) -> Path:
    """The local directory of a tokenizer, without loading it: ``tokenizer.json``, or ``vocab.json`` with merges.

    Raises:
        InputError: a file is missing, or is a Git LFS pointer.
    """
    directory = resolve(location)
    if not directory.is_dir():
        raise InputError(f"{location}: is a file, expected a network's directory")
    if not (directory / "tokenizer.json").is_file():
        if not (directory / "vocab.json").is_file():
            raise InputError(f"{location}: tokenizer.json (or vocab.json with merges.txt) is missing there")
        if not (directory / "merges.txt").is_file():
            raise InputError(f"{location}: vocab.json is there, but merges.txt is missing (tokenizer.json does too)")
    for path in directory.iterdir():
        if path.suffix in (".json", ".txt"):
            check_file(path, location)
    return directory
