"""How the papers measure: what a figure must be measured on to be compared with one of theirs.

A Fréchet distance says nothing alone: DynamiCrafter stands at 429.23 on UCF-101 in its own paper and at 404.50 in
another. So every figure is shown with its protocol, and with where it departs from the protocol it is asked to follow.
"""

from __future__ import annotations

from dataclasses import dataclass

from cinemo.types import InputError


@dataclass(frozen=True)
class Protocol:
    """One paper's way to measure on one dataset.

    Attributes:
        videos: how many are generated, each from a real clip; their first frames are the given pictures. None where the
            paper does not say.
        frames: of each video, real and generated.
        frame_stride: of real clips; None where the paper does not say.
        size: (H, W) that both are measured at; None: the model's.
        prompts: where they are from.
        metrics: that the paper reports, of `cinemo.evaluation.measurements.METRICS`.
        source: paper, section or table.
        unsaid: what the source leaves open, and what is done here.
    """

    name: str
    dataset: str
    videos: int | None
    frames: int
    frame_stride: int | None
    size: tuple[int, int] | None
    prompts: str
    metrics: tuple[str, ...]
    source: str
    unsaid: str = ""

    def departures(
        self,
        dataset: str,
        videos: int,
        frames: int,
        frame_strides: tuple[int, int] | None,
        size: tuple[int, int],
        first_frame: bool = True,
    ) -> list[str]:
        """In words, where a measurement is not as the protocol has it.

        Args:
            dataset: what was measured on, as its owner calls it: a name that begins as the protocol's is taken for it.
            frame_strides: (smallest, largest) of the real clips; None: there are none.
            first_frame: whether the given frame counts in what networks see.
        """
        found = []
        if not _plain(dataset).startswith(_plain(self.dataset).split()[0]):
            found.append(f"on {dataset}, not {self.dataset}")
        if self.videos is not None and videos != self.videos:
            found.append(f"{videos} videos, not {self.videos}")
        if not first_frame:
            found.append("without the given frame, which the paper does not leave out")
        if frames != self.frames:
            found.append(f"{frames} frames, not {self.frames}")
        if self.frame_stride and frame_strides and set(frame_strides) != {self.frame_stride}:
            low, high = frame_strides
            shown = f"{low}" if low == high else f"{low} to {high}"
            found.append(f"frame stride {shown}, not {self.frame_stride}")
        if self.size is not None and size != self.size:
            found.append(f"at {size[0]}x{size[1]}, not {self.size[0]}x{self.size[1]}")
        return found


_DYNAMICRAFTER = "DynamiCrafter (arXiv 2310.12190), section 4.2 and appendix B.1"
_TRIP = "TRIP (arXiv 2403.17005), section 4.1"
_CINEMO = "Cinemo (arXiv 2407.15642), section 4.1"
_LONGER = "Controllable Longer Image Animation (arXiv 2405.17306), section 4.1"

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "dynamicrafter-ucf101", "UCF-101", 2048, 16, 3, (256, 256), "class names", ("fvd", "kvd", "pic"),
            _DYNAMICRAFTER, "which clips are drawn",
        ),
        Protocol(
            "dynamicrafter-msrvtt", "MSR-VTT", 2048, 16, 3, (256, 256), "captions", ("fvd", "kvd", "pic"),
            _DYNAMICRAFTER, "which of a clip's captions; others could not reproduce the figure (the code's issue 10)",
        ),
        Protocol(
            "trip-webvid", "WebVid-10M validation", 2048, 16, None, (256, 256), "captions",
            ("f_consistency_4", "f_consistency", "fvd"), _TRIP,
            "which pairs of frames are compared: neighbours here; frames are 4 a second",
        ),
        Protocol(
            "trip-dtdb", "DTDB (fires, clouds, vegetation, waterfall)", None, 16, None, (256, 256), "class names",
            ("fid", "fvd"), _TRIP,
            "the number of videos; whether figures are means of the four categories, which are one set here; FID is "
            "of all frames of all videos here; frames are 4 a second",
        ),
        Protocol(
            "trip-msrvtt", "MSR-VTT validation", 2990, 16, None, (256, 256), "captions", ("fid", "fvd"), _TRIP,
            "which of a clip's 20 captions; FID is of all frames of all videos here; frames are 4 a second",
        ),
        Protocol(
            "longer-16", "Pixabay", 1024, 16, None, (512, 512), "none", ("fvd", "psnr", "ssim", "lpips", "tem_cons"),
            _LONGER, "the CLIP model; clips are taken from their start",
        ),
        Protocol(
            "longer-125", "Pixabay", 1024, 125, None, (512, 512), "none", ("fvd", "psnr", "ssim", "lpips", "tem_cons"),
            _LONGER, "the CLIP model; clips are taken from their start",
        ),
        Protocol(
            "cinemo-ucf101", "UCF-101", 2048, 16, None, (320, 512), "class names", ("fvd", "is", "fid"), _CINEMO,
            "frame stride; the given picture is a random frame of a snippet there, its first frame here",
        ),
        Protocol(
            "cinemo-msrvtt", "MSR-VTT test", 2990, 16, None, (320, 512), "captions", ("fvd", "clipsim"), _CINEMO,
            "frame stride; the given picture is a random frame of a snippet there, its first frame here",
        ),
    )
}  # fmt: skip


def _plain(name: str) -> str:
    """``WebVid-10M validation`` as ``webvid10m validation``."""
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter == " ")


def protocol_of(name: str) -> Protocol:
    """
    Raises:
        InputError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise InputError(f"--protocol {name}: unknown, expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
