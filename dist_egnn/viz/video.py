"""Write pictures, one at a time, as MP4, GIF or a folder of PNG."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..errors import Failure
from ..utils.filesystem import lock_output

Pictures = Iterator[np.ndarray]  # (height, width, 3) bytes, all of one size


def _write_folder(path: Path, pictures: Pictures, fps: float) -> None:
    from PIL import Image

    path.mkdir()
    for k, picture in enumerate(pictures):
        Image.fromarray(picture).save(path / f"frame-{k:04d}.png", optimize=True)


def _write_gif(path: Path, pictures: Pictures, fps: float) -> None:
    from PIL import GifImagePlugin, Image

    duration_ms = max(round(1000 / fps), 20)  # browsers slow down faster GIFs
    with open(path, "wb") as file:
        for picture in pictures:  # Pillow's own writer keeps all pictures in memory
            image = Image.fromarray(picture).quantize(128, dither=Image.Dither.NONE)
            if not file.tell():
                file.writelines(GifImagePlugin.getheader(image.copy(), info={"loop": 0})[0])
            file.writelines(GifImagePlugin.getdata(image, duration=duration_ms, include_color_table=True))
        file.write(b";")


def _write_mp4(path: Path, pictures: Pictures, fps: float) -> None:
    """H.264 by ffmpeg, which gets raw pictures through a pipe."""
    first = next(pictures)
    height, width = (side // 2 * 2 for side in first.shape[:2])  # H.264 needs even sides
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
    command = ["ffmpeg", "-loglevel", "error", "-y", *source, *target]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError), process.stdin:  # broken if ffmpeg ends early
                for picture in itertools.chain([first], pictures):
                    process.stdin.write(np.ascontiguousarray(picture[:height, :width]).tobytes())
        finally:
            process.wait()
        if process.returncode:
            log.seek(0)
            reason = (log.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
            raise Failure(f"{path}: ffmpeg failed ({reason}); write a .gif, or a folder of PNG")


WRITERS = {"": _write_folder, ".gif": _write_gif, ".mp4": _write_mp4}  # by suffix


def write_video(path: Path, pictures: Pictures, fps: float) -> None:
    """Write at least one picture in the format of the suffix of ``path``. An error or interruption leaves no file."""
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")

    def remove() -> None:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)

    with lock_output(path, "another process is writing it; wait for it, or choose another --out"):
        try:
            remove()  # left by a killed process
            WRITERS[path.suffix](partial, pictures, fps)
            os.replace(partial, path)
        except OSError as error:
            remedy = "free space, or choose another --out"
            raise Failure(f"{path}: cannot be written ({error.strerror}); {remedy}") from error
        finally:
            remove()
