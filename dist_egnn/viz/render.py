"""`distegnn render`: a rollout as MP4, GIF or a folder of PNG, predicted beside true, one frame in memory at a time."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Failure
from ..evaluate.vtkhdf import AGAIN, Frame, Rollout
from ..utils.filesystem import lock_output
from ..utils.progress import progress_bar
from . import plots

COLOURS = ("speed", "error", "part")
MAX_POINTS = 20_000  # more take seconds per frame and only cover one another
DPI, HEIGHT = 110, 5.2
WIDEST, NARROWEST = 6.5, 5.0  # of a pane and of a picture, in inches
TOP = 0.65  # for text above the panes
GREY = "0.65"
Pictures = Iterator[np.ndarray]  # (height, width, 3) bytes, all of one size


@dataclass(frozen=True)
class DrawnFrame:
    """The part of a frame that is drawn: n of its nodes."""

    frame: Frame
    position: np.ndarray  # (n, 3)
    colour: np.ndarray  # (n,) of the predicted nodes; NaN: grey
    true: np.ndarray | None  # (n, 3) true positions
    true_colour: np.ndarray | None  # (n,); None: grey
    mse: float | None


class DrawnFrames:
    """Every n-th frame of a rollout; each iteration reads the file again."""

    def __init__(self, rollout: Rollout, every: int, colour: str) -> None:
        self.rollout, self.every, self.colour, meta = rollout, every, colour, rollout.meta
        self.has_truth = len(rollout) > 1 and meta["start"] + meta["horizon"] < meta["true_frames"]  # after the start
        self.step_time = meta["horizon"] * (1 if meta["velocity"] == "per frame" else meta["dt"])
        self.rows = np.sort(np.random.default_rng(0).permutation(rollout.nodes)[:MAX_POINTS])  # the drawn nodes
        if colour == "error" and not self.has_truth:
            raise Failure(f"{rollout.path}: --colour error: the data have no true frame; use speed or part")

    def __len__(self) -> int:
        return -(-len(self.rollout) // self.every)

    def __iter__(self) -> Iterator[DrawnFrame]:
        previous: np.ndarray | None = None
        for frame in self.rollout:  # skipped frames too: the true velocity is a difference over one step
            true = None if frame.error is None else (frame.position - frame.error)[self.rows]
            if frame.step % self.every == 0:
                yield self._drawn(frame, true, previous)
            previous = true

    def _drawn(self, frame: Frame, true: np.ndarray | None, previous: np.ndarray | None) -> DrawnFrame:
        rows, true_colour = self.rows, None
        if self.colour == "part":
            colour = true_colour = frame.part[rows].astype(float)
        elif self.colour == "error":
            colour = np.full(len(rows), np.nan) if frame.error is None else np.linalg.norm(frame.error[rows], axis=1)
        else:
            colour = np.linalg.norm(frame.velocity[rows], axis=1)
            if true is not None:
                v = frame.velocity[rows] if previous is None else (true - previous) / self.step_time
                true_colour = np.linalg.norm(v, axis=1)
        mse = (
            None
            if frame.error is None
            else float(np.square(frame.error[self.rollout.moving].astype(np.float64)).mean())
        )
        return DrawnFrame(frame, frame.position[rows], colour, true, true_colour, mse)


def shared_limits(frames: DrawnFrames, box: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, float]:
    """Two corners (3,) of the view of all pictures and the end of their colour scale, the largest 99th percentile.

    The view contains the box and at most a quarter of its sides outside; without a box, the nodes of all frames.
    """
    low, high, top = np.full(3, np.inf), np.full(3, -np.inf), 0.0
    with progress_bar("reading", len(frames)) as tick:
        for drawn in frames:
            # percentiles, so that a few nodes that fly away do not make the others small
            for x, tail in ((drawn.position, 0.2), (drawn.true, 0.2), (drawn.frame.virtual, 0.0)):
                if x is not None and len(x):
                    low = np.minimum(low, np.percentile(x, tail, 0))
                    high = np.maximum(high, np.percentile(x, 100 - tail, 0))
            for values in (drawn.colour, drawn.true_colour):
                if values is not None and np.isfinite(values).any():
                    top = max(top, float(np.nanpercentile(values, 99)))
            tick()
    if box is not None and low[2] == high[2]:  # in two dimensions the box's depth means nothing
        box = np.column_stack([box[:, :2], low[[2, 2]]])
    if box is None:
        low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    else:
        side = box[1] - box[0]
        tallest = min(box[1][1], box[0][1] + 1.15 * (high[1] - box[0][1]))  # no empty space above the nodes
        ceiling = np.array([box[1][0], max(tallest, box[0][1] + 0.2 * side[1]), box[1][2]])
        low = np.clip(low - 0.01 * side, box[0] - side / 4, box[0])
        high = np.clip(high, ceiling, box[1] + side / 4)
    flat = high - low < 1e-9 + 0.02 * (high - low).max()  # such an axis gets some depth
    middle, half = (low + high) / 2, max(0.05 * float((high - low).max()), 1e-6)
    return np.where(flat, middle - half, low), np.where(flat, middle + half, high), top or 1.0


class Camera:
    """A figure drawn anew for each frame: a pane of the prediction beside one of the truth, or alone in the middle where
    the truth has ended. All pictures have one size, which follows from the view; no text crosses the border."""

    def __init__(self, frames: DrawnFrames) -> None:
        plt, rollout, colour, box = plots.pyplot(), frames.rollout, frames.colour, frames.rollout.box
        self.frames, views, bar_width = frames, 1 + frames.has_truth, 1.05 * (colour != "part")
        self.has_stars = len(rollout) > 1 and rollout[1].virtual is not None
        self.zoom = 1.0
        self.low, self.high, top = shared_limits(frames, box)
        self.edges: list[np.ndarray] = []  # of the box, each (2, 3)
        if box is not None:
            corners = np.array(list(itertools.product(*np.clip(box, self.low, self.high).T)))
            edges = [np.array(ends) for ends in itertools.combinations(corners, 2) if sum(ends[0] != ends[1]) == 1]
            has_lid = self.high[1] >= box[1, 1]  # otherwise the box is higher than the view
            self.edges = [ends for ends in edges if has_lid or (ends[:, 1] < self.high[1]).any()]
        self.figure = plt.figure(figsize=(WIDEST, HEIGHT), dpi=DPI)
        shift, needed = self._fit(self.figure.add_subplot(projection="3d"))
        self.figure.clear()
        pane = max(NARROWEST / views, needed + 0.3)  # width in inches
        self.width = views * pane  # without the colour bar
        self.figure.set_size_inches(self.width + bar_width, HEIGHT)
        middles = [self.width / 2, pane / 2, 1.5 * pane][: 1 + 2 * (views > 1)]
        self.panes = [(self.figure.add_subplot(projection="3d"), x) for x in middles]  # alone, predicted, true
        for axes, x in self.panes:
            self._place(axes, np.array([x + shift[0], shift[1]]))
        self.texts = [self.figure.text(0, 0, "", ha="center", va="center") for _ in range(4)]
        if colour == "part":
            palette = plt.get_cmap("tab10")(np.arange(10))
            self.colours: Any = lambda c: palette[c.astype(int) % 10]
        else:
            cmap = plt.get_cmap("viridis" if colour == "speed" else "magma_r").with_extremes(bad=GREY)
            scale = plt.Normalize(0, top)
            self.colours = lambda c: cmap(scale(np.ma.masked_invalid(c)))
            unit = "length / frame" if rollout.meta["velocity"] == "per frame" else "length / time"
            label = f"speed [{unit}]" if colour == "speed" else "distance from the true position [length]"
            total = self.width + bar_width
            bar = self.figure.add_axes(((self.width + 0.1) / total, 0.18, 0.14 / total, 0.64))
            self.figure.colorbar(plt.cm.ScalarMappable(scale, cmap), cax=bar, extend="max", label=label)
        # a mark is about as large as the spacing of particles that fill the view
        self.size = float(np.clip(6e4 / len(frames.rows) ** (2 / 3) / 40, 1.5, 30))

    def _place(self, axes: Any, middle: np.ndarray) -> None:
        """Centre axes on a point, in inches. They are a square, and draw nothing outside it."""
        side, size = 1.5 * WIDEST, np.array([self.figure.get_figwidth(), HEIGHT])
        axes.set_position((*(middle - side / 2) / size, *side / size))

    def _fit(self, axes: Any) -> tuple[np.ndarray, float]:
        """Set the zoom at which the view and its labels fill the picture's height, or WIDEST.

        Returns where axes must be placed (x from the middle of their pane, y), and the width that is then needed.
        """
        bottom = 0.35 * self.has_stars + 0.05
        room, middle = np.array([WIDEST - 0.3, HEIGHT - TOP - bottom]), np.array([WIDEST, bottom + HEIGHT - TOP]) / 2
        place = middle
        for _ in range(3):  # labels do not grow with the view
            self._place(axes, place)
            self._view(axes, None, None)
            self.figure.canvas.draw()
            extents = [a.get_tightbbox(self.figure.canvas.get_renderer()) for a in (axes.xaxis, axes.yaxis, axes.zaxis)]
            limits = axes.get_xlim(), axes.get_ylim(), axes.get_zlim()
            corners = np.array(list(itertools.product(*limits, [1]))) @ axes.M.T
            drawn = [axes.transData.transform(corners[:, :2] / corners[:, 3:]), *(e.get_points() for e in extents)]
            low, high = (f(np.concatenate(drawn), 0) / self.figure.dpi for f in (np.min, np.max))
            self.zoom *= float((room / (high - low)).min())
            place = place + middle - (low + high) / 2
        return place - [WIDEST / 2, 0], float(high[0] - low[0])

    def pictures(self) -> Iterator[np.ndarray]:
        with progress_bar("rendering", len(self.frames)) as tick:
            for drawn in self.frames:
                yield self.draw(drawn)
                tick()

    def draw(self, drawn: DrawnFrame) -> np.ndarray:
        """The picture, (height, width, 3) bytes."""
        frame, count, rollout = drawn.frame, len(drawn.position), self.frames.rollout
        outside = int(np.isnan(self._inside(drawn.position)).any(1).sum())
        title = f"step {frame.step} of {len(rollout) - 1}: frame {frame.frame}, t = {frame.time:.4g}"
        title += f", {count:,} of {rollout.nodes:,} nodes drawn" * (count < rollout.nodes)
        panes = self.panes[:1] if drawn.true is None or len(self.panes) == 1 else self.panes[1:]
        for pane in self.panes:
            pane[0].set_visible(pane in panes)
        self._view(panes[0][0], drawn.position, drawn.colour)
        names = ["predicted" if frame.step else "start", "true"]
        names[0] += f", MSE {drawn.mse:.2e}" if drawn.mse is not None and frame.step else ""
        end = f" (the data end at frame {rollout.meta['true_frames'] - 1})"
        names[0] += (end + ", grey: no true position" * (self.frames.colour == "error")) * (drawn.mse is None)
        z, stars = frame.virtual, ""
        if z is not None and len(z):
            stars = f"☆ {plots.draw_virtual_nodes(panes[0][0], self._inside(z), 230)}"
        if len(panes) > 1:
            self._view(panes[1][0], drawn.true, drawn.true_colour)
        middle = self.width / 2
        self._write(0, title + f", {outside:,} outside the view" * bool(outside), middle, HEIGHT - 0.2, 12, self.width)
        self._write(1, stars, middle, 0.16, 10, self.width)
        for k, (_, x) in enumerate(panes):
            self._write(2 + k, names[k], x, HEIGHT - 0.5, 11, self.width / len(panes))
        if len(panes) == 1:
            self._write(3, "", middle, 0, 11, self.width)
        self.figure.canvas.draw()
        return np.asarray(self.figure.canvas.buffer_rgba())[..., :3].copy()

    def _write(self, number: int, text: str, x: float, y: float, size: float, width: float) -> None:
        """Write a line of this size around (x, y), smaller if it is wider than ``width`` inches."""
        artist = self.texts[number]
        artist.set(text=text, fontsize=size, position=(x / self.figure.get_figwidth(), y / HEIGHT))
        needed = artist.get_window_extent().width / self.figure.dpi
        artist.set_fontsize(size * min(1, (width - 0.1) / max(needed, 1e-6)))

    def _view(self, axes: Any, x: np.ndarray | None, colour: np.ndarray | None) -> None:
        axes.clear()
        axes.patch.set_visible(False)  # it reaches into the other pane
        axes.computed_zorder = False
        plots.view(axes, self.low, self.high, zoom=self.zoom)
        axes.locator_params(nbins=4)
        axes.tick_params(labelsize=7, pad=2 if plots.is_flat(self.low, self.high) else -2)
        axes.xaxis.labelpad = axes.yaxis.labelpad = 6
        for ends in self.edges:
            axes.plot(*ends[:, [0, 2, 1]].T, color="0.4", lw=0.8, zorder=0.5)
        if x is not None:
            c = GREY if colour is None else self.colours(colour)
            axes.scatter(*self._inside(x)[:, [0, 2, 1]].T, c=c, s=self.size, linewidths=0, depthshade=False)

    def _inside(self, x: np.ndarray) -> np.ndarray:
        """x, with NaN outside the view: matplotlib does not clip 3-D plots."""
        return np.where(np.all((x >= self.low) & (x <= self.high), axis=1, keepdims=True), x, np.nan)


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
            if path.exists():
                raise Failure(f"{path}: exists; remove it or choose another --out")
            remove()  # left by a killed process
            WRITERS[path.suffix](partial, pictures, fps)
            os.replace(partial, path)
        except OSError as error:
            remedy = "free space, or choose another --out"
            raise Failure(f"{path}: cannot be written ({error.strerror}); {remedy}") from error
        finally:
            remove()


def run_render(path: Path, out: Path | None, fps: float, every: int, colour: str) -> None:
    """Render a rollout to ``out``, by default the MP4 beside it. Raises Failure for bad options or input."""
    out = path.with_suffix(".mp4") if out is None else out
    if colour not in COLOURS:
        raise Failure(f"--colour {colour}: use one of {', '.join(COLOURS)}")
    if not (every >= 1 and 0 < fps <= 1000):
        raise Failure(f"--every {every} --fps {fps:g}: must be at least 1; above 0 and at most 1000")
    if out.suffix not in WRITERS:
        raise Failure(f"--out {out}: must end in .mp4 or .gif; a name without an ending is a folder of PNG")
    if out.suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise Failure(f"{out}: MP4 needs the program ffmpeg; install it, or write --out {out.with_suffix('.gif')}")
    with Rollout(path) as rollout:
        if not len(rollout):
            raise Failure(f"{path}: no frame; {AGAIN}")
        frames = DrawnFrames(rollout, every, colour)
        camera = Camera(frames)
        try:
            write_video(out, camera.pictures(), fps)
        finally:
            plots.pyplot().close(camera.figure)
    drawn, nodes, plural = len(frames.rows), rollout.nodes, "s" * (len(frames) > 1)
    print(
        f"{out}: {len(frames)} picture{plural}, coloured by {colour}"
        + f"; {drawn:,} of {nodes:,} nodes drawn" * (drawn < nodes)
    )
