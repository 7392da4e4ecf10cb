"""Video files as people's tools leave them: stream copies, cuts, joins and remuxes by ffmpeg, drawn from a seed."""

from __future__ import annotations

import itertools
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

RATE, FRAMES, HEIGHT, WIDTH = 25, 80, 64, 96
_X264 = ["-c:v", "libx264", "-preset", "veryfast"]
_MP4 = ("mp4", "mov", "mkv")
# name -> (suffix of the file that is made first, encoder's arguments, containers that hold it)
_LAGGING = ["-b:v", "400k", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-g", "25"]
_X265 = ["-c:v", "libx265", "-x265-params"]
ENCODINGS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "h264": ("mp4", [*_X264, "-g", "20", "-bf", "3"], (*_MP4, "ts", "avi", "flv")),
    "h264-plain": ("mp4", [*_X264, "-g", "15", "-bf", "0", "-profile:v", "baseline"], (*_MP4, "ts", "avi")),
    "h264-pyramid": (
        "mp4", [*_X264, "-x264-params", "keyint=30:bframes=8:b-pyramid=normal:b-adapt=0:ref=6"], (*_MP4, "ts", "avi"),
    ),
    "h264-open": ("ts", [*_X264, "-x264-params", "keyint=16:open-gop=1:bframes=2"], (*_MP4, "ts", "avi")),
    "h264-refresh": ("ts", [*_X264, "-x264-params", "keyint=12:intra-refresh=1:bframes=0"], (*_MP4, "ts")),
    "h264-still": ("mp4", [*_X264, "-g", "1"], (*_MP4, "ts", "avi")),
    "hevc": ("mp4", [*_X265, "keyint=16:bframes=3:log-level=none:pools=1"], (*_MP4, "ts")),
    "hevc-closed": ("mp4", [*_X265, "keyint=20:open-gop=0:bframes=2:log-level=none:pools=1"], (*_MP4, "ts")),
    "mpeg4": ("mp4", ["-c:v", "mpeg4", "-q:v", "3", "-bf", "2", "-g", "12"], (*_MP4, "avi", "ts")),
    "xvid": ("avi", ["-c:v", "libxvid", "-q:v", "3", "-bf", "2", "-g", "25"], ("avi", "mkv", "mp4")),
    "mpeg2": ("ts", ["-c:v", "mpeg2video", "-q:v", "3", "-bf", "2", "-g", "12"], ("ts", "mpg", "mkv", "mp4")),
    "mjpeg": ("avi", ["-c:v", "mjpeg", "-q:v", "3"], ("avi", "mov", "mkv")),
    "vp8": ("webm", ["-c:v", "libvpx", *_LAGGING], ("webm", "mkv")),
    "vp9": ("webm", ["-c:v", "libvpx-vp9", *_LAGGING, "-cpu-used", "8"], ("webm", "mkv", "mp4")),
    "av1": ("mp4", ["-c:v", "libsvtav1", "-preset", "12", "-g", "25", "-qp", "30"], ("mp4", "mkv", "webm")),
}  # fmt: skip
ROTATIONS = {
    "flipped": (1, 0, 0, -1), "mirrored": (-1, 0, 0, 1), "transposed": (0, 1, 1, 0), "transverse": (0, -1, -1, 0),
    "clockwise": (0, 1, -1, 0), "anticlockwise": (0, -1, 1, 0), "upside down": (-1, 0, 0, -1),
}  # fmt: skip


def ffmpeg(*arguments: str | Path) -> None:
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")


def shown(path: Path) -> list[np.ndarray]:
    """Every picture that ffmpeg shows, RGB ``HWC``: the reference."""
    scaling = "scale=flags=area+full_chroma_int,format=rgb24"
    with tempfile.TemporaryDirectory() as folder:
        command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", str(path), "-map", "0:V:0"]
        command += ["-vsync", "passthrough", "-vf", scaling, f"{folder}/%05d.ppm"]
        subprocess.run(command, check=False, capture_output=True)
        return [np.asarray(Image.open(file)) for file in sorted(Path(folder).glob("*.ppm"))]


def noise(count: int, height: int, width: int, seed: int) -> np.ndarray:
    """Frames that differ from each other everywhere, smooth enough to survive compression."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 6, 3), np.uint8)
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR) for frame in coarse])


def encode(path: Path, arguments: list[str], seed: int) -> Path:
    raw = path.with_suffix(".raw")
    raw.write_bytes(noise(FRAMES, HEIGHT, WIDTH, seed).tobytes())
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", str(RATE), "-i", raw]
    ffmpeg(*source, *(["-pix_fmt", "yuv420p"] if "mjpeg" not in arguments else []), *arguments, path)
    raw.unlink()
    return path


class Draws:
    """Files of a folder, each made by up to three steps that are drawn from ``seed``."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.numbers = itertools.count()
        self.bases: dict[tuple[str, int], Path] = {}

    def __iter__(self) -> Iterator[tuple[str, Path]]:
        """(what was done, file), without end; what ffmpeg refuses to make is left out."""
        while True:
            name = self.draw.choice(list(ENCODINGS))
            path, steps = self.base(name), [name]
            try:
                for _ in range(self.draw.randint(1, 3)):
                    step = self.draw.choice(STEPS)
                    path, text = getattr(self, step)(name, path)
                    steps.append(text)
            except (RuntimeError, LookupError):
                continue
            if path.stat().st_size:
                yield ", ".join(steps), path

    def base(self, name: str, seed: int = 0) -> Path:
        if (name, seed) not in self.bases:
            suffix, arguments, _ = ENCODINGS[name]
            self.bases[name, seed] = encode(self.folder / f"base-{name}-{seed}.{suffix}", arguments, seed)
        return self.bases[name, seed]

    def new(self, suffix: str) -> Path:
        return self.folder / f"{next(self.numbers):04d}.{suffix}"

    def container(self, name: str) -> str:
        return self.draw.choice(ENCODINGS[name][2])

    def remux(self, name: str, path: Path) -> tuple[Path, str]:
        out = self.new(self.container(name))
        ffmpeg("-i", path, "-map", "0:v", "-c", "copy", out)
        return out, f"remuxed to {out.suffix}"

    def cut(self, name: str, path: Path) -> tuple[Path, str]:
        out = self.new(self.container(name))
        start, length = self.draw.uniform(0, 2), self.draw.uniform(0.6, 2.5)
        options = ["-ss", f"{start:.3f}", "-t", f"{length:.3f}"]
        before = self.draw.random() < 0.7
        source = ["-i", path]
        extra = self.draw.choice([[], [], ["-copyts"], ["-avoid_negative_ts", "disabled"]])
        ffmpeg(
            *(options if before else []),
            *source,
            *([] if before else options),
            "-map",
            "0:v",
            "-c",
            "copy",
            *extra,
            out,
        )
        return out, f"cut {start:.2f}+{length:.2f} {'before' if before else 'after'} {' '.join(extra)} to {out.suffix}"

    def fragments(self, name: str, path: Path) -> tuple[Path, str]:
        if "mp4" not in ENCODINGS[name][2]:
            raise LookupError(name)
        out = self.new("mp4")
        flags = self.draw.choice(
            ["frag_keyframe+empty_moov", "frag_keyframe", "faststart", "frag_every_frame+empty_moov"]
        )
        ffmpeg("-i", path, "-map", "0:v", "-c", "copy", "-movflags", flags, out)
        return out, flags

    def beheaded(self, name: str, path: Path) -> tuple[Path, str]:
        """A transport stream that was joined in the middle."""
        if "ts" not in ENCODINGS[name][2]:
            raise LookupError(name)
        whole, out = self.new("ts"), self.new("ts")
        ffmpeg("-i", path, "-map", "0:v", "-c", "copy", whole)
        content = whole.read_bytes()
        packets = len(content) // 188
        begin = self.draw.randrange(1, max(2, packets // 2))
        out.write_bytes(content[188 * begin :])
        return out, f"ts without its first {begin} of {packets} packets"

    def joined(self, name: str, path: Path) -> tuple[Path, str]:
        """Two transport streams, one behind the other, as ``cat`` does it."""
        others = [name] if self.draw.random() < 0.7 else [n for n in ENCODINGS if n.split("-")[0] == name.split("-")[0]]
        other = self.draw.choice(others)
        if "ts" not in ENCODINGS[name][2] or "ts" not in ENCODINGS[other][2]:
            raise LookupError(name)
        parts = [self.new("ts"), self.new("ts")]
        offset = self.draw.choice(["0", "0", "20", "-0.5"])
        ffmpeg("-i", path, "-map", "0:v", "-c", "copy", parts[0])
        ffmpeg("-i", self.base(other, 1), "-map", "0:v", "-c", "copy", "-output_ts_offset", offset, parts[1])
        out = self.new("ts")
        out.write_bytes(b"".join(part.read_bytes() for part in parts))
        return out, f"joined with {other} at {offset}"

    def listed(self, name: str, path: Path) -> tuple[Path, str]:
        """Two files by ffmpeg's concat demuxer."""
        out, text = self.new(self.container(name)), self.new("txt")
        text.write_text("".join(f"file '{p}'\n" for p in (path.resolve(), self.base(name, 1).resolve())))
        ffmpeg("-f", "concat", "-safe", "0", "-i", text, "-map", "0:v", "-c", "copy", out)
        return out, f"concat demuxer to {out.suffix}"

    def turned(self, name: str, path: Path) -> tuple[Path, str]:
        if "mp4" not in ENCODINGS[name][2]:
            raise LookupError(name)
        plain, out = self.new("mp4"), self.new("mp4")
        ffmpeg("-i", path, "-map", "0:v", "-c", "copy", plain)
        turn = self.draw.choice(list(ROTATIONS))
        out.write_bytes(with_matrix(plain.read_bytes(), ROTATIONS[turn]))
        return out, turn

    def retimed(self, name: str, path: Path) -> tuple[Path, str]:
        """Uneven times, as variable frame rates have."""
        out = self.new(self.container(name))
        shift = self.draw.choice(["PTS*2", "PTS+floor(PTS*TB)/TB", "PTS*0.5"])
        other = shift.replace("PTS", "DTS")
        ffmpeg("-i", path, "-map", "0:v", "-c", "copy", "-bsf:v", f"setts=pts={shift}:dts={other}", out)
        return out, f"times {shift} to {out.suffix}"

    def rated(self, name: str, path: Path) -> tuple[Path, str]:
        out = self.new(self.container(name))
        rate = self.draw.choice(["12.5", "50", "24000/1001"])
        ffmpeg("-i", path, "-map", "0:v", "-c", "copy", "-r", rate, out)
        return out, f"rate {rate} to {out.suffix}"


STEPS = [
    "remux",
    "remux",
    "cut",
    "cut",
    "cut",
    "fragments",
    "beheaded",
    "joined",
    "listed",
    "turned",
    "retimed",
    "rated",
]


def with_matrix(content: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An mp4 whose tracks have another display matrix (ISO/IEC 14496-12 section 8.3.2)."""
    data, place = bytearray(content), content.find(b"tkhd")
    while place >= 0:
        begin = place + 4 + (40 if data[place + 4] == 0 else 52)
        a, b, c, d = (np.array(65536 * value, ">i4").tobytes() for value in matrix)
        data[begin : begin + 4], data[begin + 4 : begin + 8] = a, b
        data[begin + 12 : begin + 16], data[begin + 16 : begin + 20] = c, d
        place = content.find(b"tkhd", place + 1)
    return bytes(data)
