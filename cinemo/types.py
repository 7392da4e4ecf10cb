"""The values that travel between rooms, and the errors a user can mend.

Shape legend, used as suffixes of tensor names everywhere:
``B`` batch, ``F`` frames, ``C`` channels, ``H W`` rows and columns (pixels for images, cells for latents),
``L`` text tokens, ``D`` feature width.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a process that only decodes videos starts four seconds sooner without it
    import torch
    from torch import Tensor


class InputError(ValueError):
    """Bad input that the caller can mend.

    The message is one line: the thing, what was got, what was expected, what to do.
    """


class RunError(RuntimeError):
    """A run that could not be finished for a reason worth one line (not a bug): too many failed clips, lost storage."""


class NoRoom(RunError, OSError):
    """A local disk is full."""


class BadPlace(InputError, OSError):
    """A local path that cannot be written: its name is too long, it is forbidden, or a file is in its way."""


def check_schema(found: object, known: int, what: str) -> None:
    """Refuse what was written in a later format than ``known``, the latest that this version reads.

    Args:
        found: the number that the record states; None where it states none, as the first format of some records.
        what: the thing and its place, for the error.

    Raises:
        InputError: it is later, or no number.
    """
    if found is not None and not (isinstance(found, int) and 1 <= found <= known):
        raise InputError(f"{what}: has format {found}, this version of cinemo reads up to {known}; update cinemo")


def refuse(faults: Sequence[str], all_of_them: str, say: Callable[[str], None]) -> None:
    """Nothing where there is no fault; else end with the only one, or say each and end with ``all_of_them``.

    Raises:
        InputError: there are faults.
    """
    if len(faults) == 1:
        raise InputError(faults[0])
    for fault in faults:
        say(fault)
    if faults:
        raise InputError(all_of_them)


NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})  # of a full disk
_BAD_PLACE = frozenset(
    {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP}
)


def local_fault(error: OSError, place: str, elsewhere: str | None = None) -> NoRoom | BadPlace | None:
    """What a person can mend about a fault of a local disk, in one line; None where it is another kind of fault.

    Args:
        place: what was written, where the error does not name it.
        elsewhere: how to choose another place, where that is more than to choose one; then every fault can be mended.
    """
    advice, said = elsewhere or "choose another place", f"{error.filename or place}: cannot write there"
    fault: NoRoom | BadPlace
    if error.errno in NO_ROOM:
        fault = NoRoom(f"{said} ({error.strerror}); free some space there or {advice}, then run the same command again")
    elif error.errno in _BAD_PLACE or elsewhere:
        fault = BadPlace(f"{said} ({error.strerror or error}); {advice}")
    else:
        return None
    fault.errno = error.errno
    return fault


@contextmanager
def local_faults(place: str | Path, elsewhere: str | None = None) -> Iterator[None]:
    """Around what writes to a local disk: raises `local_fault`, or what that cannot say."""
    try:
        yield
    except (InputError, RunError):
        raise
    except OSError as error:
        raise local_fault(error, str(place), elsewhere) or error from None


SET_TMPDIR = "set TMPDIR to another directory"  # for temporary files


class ClipError(Exception):
    """One clip that cannot be used; it ends in the quarantine ledger and never stops a job.

    Args:
        stage: where it failed: ``open``, ``decode``, ``score`` or ``encode``.
        reason: a short stable slug for counting (``missing``, ``unreadable``, ``too_few_frames``, ...).
        detail: one line for a person, with numbers.
    """

    def __init__(self, stage: str, reason: str, detail: str) -> None:
        super().__init__(f"{stage}: {reason}: {detail}")
        self.stage, self.reason, self.detail = stage, reason, detail

    def __reduce__(self) -> tuple[type[ClipError], tuple[str, str, str]]:
        return ClipError, (self.stage, self.reason, self.detail)


def keyed_seed(seed: int, *key: str | int) -> int:
    """A 63-bit seed that depends on ``seed`` and a stable key alone (clip id, view, step), never on arrival order."""
    text = "\x1f".join([str(seed), *map(str, key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def keyed_generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU ``torch.Generator`` at `keyed_seed`; CPU so that every device sees the same numbers."""
    import torch

    return torch.Generator().manual_seed(keyed_seed(seed, *key))


@dataclass(frozen=True)
class Clip:
    """One row of a manifest. ``start``/``end`` bound the usable part of the file, in seconds."""

    clip_id: str
    uri: str
    caption: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Frames:
    """Decoded frames of one view of a clip.

    ``frames_FHWC``: uint8 RGB. ``fps``: frame rate of the file. ``start_frame`` and ``frame_interval`` say which frames
    of the file these are: ``start_frame + k * frame_interval``, counted in presentation order.
    """

    frames_FHWC: np.ndarray
    fps: float
    frame_interval: int
    start_frame: int


@dataclass(frozen=True)
class LatentSample:
    """One stored training example.

    ``latents_FCHW``: float16, already multiplied by the VAE's scaling factor. ``extra``: the manifest's own columns.
    ``fields``: what was asked for beside the latents and is there: float16 arrays ``text_states`` (L, D),
    ``image_tokens`` (L, D), ``frame_tokens`` (F, L, D) and ``flow`` (F-1, 2, h, w); ``first_frame`` and ``frames`` as
    the bytes of a JPEG.
    """

    key: str
    clip_id: str
    uri: str
    caption: str
    latents_FCHW: np.ndarray
    ssim: float
    fps: float
    frame_interval: int
    start_frame: int
    view: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def changed(self, **values: Any) -> LatentSample:
        """`dataclasses.replace` at a fifth of its time, which is a third of what reading a sample takes."""
        other = object.__new__(LatentSample)
        other.__dict__.update(self.__dict__, **values)
        return other


@dataclass(frozen=True)
class Refusal:
    """One clip in the quarantine ledger."""

    clip_id: str
    uri: str
    stage: str
    reason: str
    detail: str


class Condition(dict[str, Any]):
    """What a network is told beside x and t: named tensors, or tuples and dictionaries of such, batch first.

    Only the method that declares a name knows what it means; everything else treats all names alike. Cinemo's are
    ``image`` (B, C, h, w), the first frame's scaled latent, zeros where none is given; ``text`` (B, L, D), text states;
    ``motion_bucket`` (B,), 0..19 as float, larger = more motion, NaN where none is given.
    """

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """The same condition on another device or in another floating dtype."""
        return Condition(_each(lambda x: x.to(device, dtype if x.is_floating_point() else None), dict(self)))

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return _rows(dict(self))

    def expand(self, count: int) -> Condition:
        """A single row (views of it) ``count`` times."""
        return Condition(_each(lambda x: x.expand(count, *x.shape[1:]), dict(self)))

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """The rows of all ``parts``, one after the other. They have the same names."""
        import torch

        return Condition(_each(lambda *tensors: torch.cat(tensors), *map(dict, parts)))


def _each(function: Callable[..., Tensor], *trees: Any) -> Any:
    """``function`` of the tensors at each place of ``trees``, which are shaped alike."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {name: _each(function, *(tree[name] for tree in trees)) for name in first}
    if isinstance(first, tuple):
        return tuple(_each(function, *parts) for parts in zip(*trees, strict=True))
    return function(*trees)


def _rows(tree: Any) -> int:
    while isinstance(tree, (Mapping, tuple)):
        tree = next(iter(tree.values())) if isinstance(tree, Mapping) else tree[0]
    return len(tree)


@dataclass(frozen=True)
class LatentBatch:
    """A training batch: ``video_BCFHW`` are latents of all frames, the first one included."""

    video_BCFHW: Tensor
    condition: Condition
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampled:
    """A video that is not decoded yet.

    ``latents_CFHW``: float32, scaled. ``settings``: everything needed to make it again.
    """

    latents_CFHW: Tensor
    fps: float
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Animation(Sampled):
    """The result of animating one image.

    ``frames_FHWC``: uint8 RGB, the first one being the (decoded) input image.
    """

    frames_FHWC: np.ndarray
