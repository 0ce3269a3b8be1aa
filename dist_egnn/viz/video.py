"""Films of pictures that come one by one: MP4, GIF, or a folder of PNG; none is kept, and no half film is left."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import Failure
from ..utils.filesystem import lock_output


class Sink(Protocol):
    """Takes pictures, all of one size."""

    def add(self, picture: np.ndarray) -> None: ...

    def close(self) -> None: ...


class Folder:
    """frame-0000.png and so on."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.count = path, 0
        path.mkdir()

    def add(self, picture: np.ndarray) -> None:
        from PIL import Image

        Image.fromarray(picture).save(self.path / f"frame-{self.count:04d}.png", optimize=True)
        self.count += 1

    def close(self) -> None:
        pass


class Gif:
    """Frame by frame: Pillow's own way to write a GIF keeps all of them."""

    def __init__(self, path: Path, fps: float) -> None:
        self.file, self.begun = open(path, "wb"), False  # noqa: SIM115 (closed below)
        self.ms = max(round(1000 / fps), 20)  # browsers slow down what is faster

    def add(self, picture: np.ndarray) -> None:
        from PIL import GifImagePlugin, Image

        image = Image.fromarray(picture).quantize(128, dither=Image.Dither.NONE)
        if not self.begun:
            self.file.writelines(GifImagePlugin.getheader(image.copy(), info={"loop": 0})[0])
            self.begun = True
        self.file.writelines(GifImagePlugin.getdata(image, duration=self.ms, include_color_table=True))

    def close(self) -> None:
        if self.begun:
            self.file.write(b";")
        self.file.close()


class Mp4:
    """H.264 by ffmpeg, which gets raw pictures through a pipe."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self.process: subprocess.Popen[bytes] | None = None
        self.log = open(path.with_name(path.name + ".log"), "w+b")  # noqa: SIM115 (closed below)

    def add(self, picture: np.ndarray) -> None:
        even = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]  # H.264 wants even sides
        if self.process is None:
            size = f"{even.shape[1]}x{even.shape[0]}"
            source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(self.fps), "-i", "-"]
            coded = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(self.path)]
            command = ["ffmpeg", "-loglevel", "error", "-y", *source, *coded]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(np.ascontiguousarray(even).tobytes())
        except BrokenPipeError:
            self.close()

    def close(self) -> None:
        process, self.process = self.process, None
        try:
            if process is not None:
                process.communicate()
                if process.returncode:
                    self.log.seek(0)
                    said = (self.log.read().decode(errors="replace").strip().splitlines() or ["nothing said"])[-1]
                    raise Failure(f"{self.path}: ffmpeg failed ({said}); write a .gif, or a folder of PNG")
        finally:
            self.log.close()
            Path(self.log.name).unlink(missing_ok=True)


SINKS: dict[str, type[Folder] | type[Gif] | type[Mp4]] = {"": Folder, ".gif": Gif, ".mp4": Mp4}


@contextmanager
def whole(path: Path, fps: float) -> Iterator[Sink]:
    """A sink whose file or folder gets its name at the end; whatever goes wrong before leaves nothing."""
    fresh = path.with_name(f"{path.stem}.partial{path.suffix}")

    def remove() -> None:
        shutil.rmtree(fresh) if fresh.is_dir() else fresh.unlink(missing_ok=True)

    with lock_output(path, "another one is writing it; wait for it, or choose another --out"):
        try:
            remove()  # of one that was killed
            sink = SINKS[path.suffix](fresh, fps)
            try:
                yield sink
            finally:
                sink.close()
            os.replace(fresh, path)
        except OSError as error:
            remove()
            raise Failure(
                f"{path}: cannot be written ({error.strerror}); make room or rights, or choose --out"
            ) from error
        except BaseException:
            remove()
            raise
