"""A rollout as moving pictures: MP4, GIF, or a folder of PNG, predicted beside true; one frame in memory at a time."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Failure
from ..evaluate.vtkhdf import Frame, Rollout
from ..utils.progress import progress_bar
from . import plots, video

COLOURS = ("speed", "error", "part")
SHOWN = 20_000  # points that are drawn: more take seconds a frame and only paint over one another
DPI = 110
GREY = "0.65"


@dataclass(frozen=True)
class Shot:
    """What a picture shows of a frame. Rows: the nodes that are drawn."""

    frame: Frame
    position: np.ndarray  # (n, 3)
    colour: np.ndarray  # (n,) of the predicted nodes; NaN: grey
    true: np.ndarray | None  # (n, 3)
    true_colour: np.ndarray | None  # (n,); None: grey
    mse: float | None


class Shots:
    """The shots of a rollout's every n-th frame, read one after the other, as often as they are asked for.

    rows: which nodes are drawn; known: whether any frame but the first has a true one.
    """

    def __init__(self, rollout: Rollout, every: int, colour: str) -> None:
        self.rollout, self.every, self.colour = rollout, every, colour
        meta = rollout.meta
        self.known = len(rollout) > 1 and meta["start"] + meta["horizon"] < meta["true_frames"]
        self.unit = meta["horizon"] * (meta["dt"] if meta["velocity"] == "stored" else 1)
        count = min(SHOWN, rollout.nodes)
        self.rows = np.sort(np.random.default_rng(0).permutation(rollout.nodes)[:count])
        if colour == "error" and not self.known:
            raise Failure(
                f"{rollout.path}: --colour error: the data have no true frame to compare with; use speed or part"
            )

    def __len__(self) -> int:
        return -(-len(self.rollout) // self.every)

    def __iter__(self) -> Iterator[Shot]:
        before: np.ndarray | None = None
        for frame in self.rollout:  # the skipped ones too: the truth's velocity is a difference over a step
            true = None if frame.error is None else frame.position - frame.error
            if frame.step % self.every == 0:
                yield self._shot(frame, true, before)
            before = true

    def _shot(self, frame: Frame, true: np.ndarray | None, before: np.ndarray | None) -> Shot:
        rows, true_colour = self.rows, None
        if self.colour == "part":
            colour = frame.part[rows].astype(float)
            true_colour = colour
        elif self.colour == "error":
            error = np.full((len(rows), 3), np.nan) if frame.error is None else frame.error[rows]
            colour = np.linalg.norm(error, axis=1)
        else:
            colour = np.linalg.norm(frame.velocity[rows], axis=1)
            if true is not None:
                v = frame.velocity[rows] if before is None else (true[rows] - before[rows]) / self.unit
                true_colour = np.linalg.norm(v, axis=1)
        mse = None if frame.error is None else float(np.square(frame.error.astype(np.float64)).mean())
        return Shot(frame, frame.position[rows], colour, None if true is None else true[rows], true_colour, mse)


def ranges(shots: Shots, box: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, float]:
    """What all pictures share: corners (3,) of the view, and where colours end (the largest 99th percentile of a frame).

    The view is the box and what lies outside, by up to a quarter of it; without a box, where the nodes are in any frame.
    """
    low, high, top = np.full(3, np.inf), np.full(3, -np.inf), 0.0
    with progress_bar("looking through", len(shots)) as tick:
        for shot in shots:
            # a few that fly away shall not make all others small
            for x in (shot.position, *([] if shot.true is None else [shot.true])):
                low, high = np.minimum(low, np.percentile(x, 0.2, 0)), np.maximum(high, np.percentile(x, 99.8, 0))
            z = shot.frame.virtual
            if z is not None and len(z):
                low, high = np.minimum(low, z.min(0)), np.maximum(high, z.max(0))
            for values in (shot.colour, shot.true_colour):
                if values is not None and np.isfinite(values).any():
                    top = max(top, float(np.nanpercentile(values, 99)))
            tick()
    if box is None:
        low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    else:
        side = box[1] - box[0]
        tallest = min(box[1][1], box[0][1] + 1.15 * (high[1] - box[0][1]))  # no empty air above
        ceiling = np.array([box[1][0], max(tallest, box[0][1] + 0.2 * side[1]), box[1][2]])
        low = np.clip(low - 0.01 * side, box[0] - side / 4, box[0])
        high = np.clip(high, ceiling, box[1] + side / 4)
    flat = high - low < 1e-9 + 0.02 * (high - low).max()  # a view has some depth
    middle, half = (low + high) / 2, max(0.05 * float((high - low).max()), 1e-6)
    return np.where(flat, middle - half, low), np.where(flat, middle + half, high), top or 1.0


class Camera:
    """A figure of one or two views, drawn anew for each shot."""

    def __init__(self, shots: Shots, colour: str) -> None:
        plt = plots.pyplot()
        rollout = shots.rollout
        self.box, self.errors = rollout.box, colour == "error"
        self.low, self.high, top = ranges(shots, rollout.box)
        self.nodes, self.last = rollout.nodes, len(rollout) - 1
        self.velocity = "length / time" if rollout.meta["velocity"] == "stored" else "length / frame"
        views = 1 + shots.known
        self.figure = plt.figure(figsize=(5.2 * views + 0.8, 5.2), dpi=DPI)
        self.axes = [self.figure.add_subplot(1, views, k + 1, projection="3d") for k in range(views)]
        self.figure.subplots_adjust(left=0.01, right=0.9 - 0.04 * (views == 1), bottom=0.08, top=0.89, wspace=0.02)
        if colour == "part":
            self.parts = plt.get_cmap("tab10")(np.arange(10))
            self.paint: Any = lambda c: self.parts[c.astype(int) % 10]
        else:
            cmap = plt.get_cmap("viridis" if colour == "speed" else "magma_r").with_extremes(bad=GREY)
            scale = plt.Normalize(0, top)
            self.paint = lambda c: cmap(scale(np.ma.masked_invalid(c)))
            what = f"speed [{self.velocity}]" if colour == "speed" else "distance from the true position [length]"
            place = self.figure.add_axes((0.915 - 0.02 * (views == 1), 0.18, 0.014, 0.6))
            mappable = plt.cm.ScalarMappable(scale, cmap)
            self.figure.colorbar(mappable, cax=place, extend="max").set_label(what, fontsize=10)
        # a mark about as large as the spacing of particles that fill the view
        self.size = float(np.clip(6e4 / len(shots.rows) ** (2 / 3) / 40, 1.5, 30))

    def draw(self, shot: Shot) -> np.ndarray:
        """The picture, (height, width, 3) bytes."""
        frame = shot.frame
        note = f", {len(shot.position):,} of {self.nodes:,} nodes drawn" if len(shot.position) < self.nodes else ""
        lost = int(np.isnan(self._inside(shot.position)).any(1).sum())
        note += f", {lost:,} outside the view" if lost else ""
        self.figure.suptitle(f"step {frame.step} of {self.last}: frame {frame.frame}, t = {frame.time:.4g}{note}")
        self._view(self.axes[0], shot.position, shot.colour)
        error = f", MSE {shot.mse:.2e}" if shot.mse is not None else " (grey: no true frame)" * self.errors
        self.axes[0].set_title(f"predicted{error}" if frame.step else "start", fontsize=11)
        if frame.virtual is not None and len(frame.virtual):
            x = self._inside(frame.virtual)
            style = {"marker": "*", "s": 230, "c": "white", "edgecolors": "black", "linewidths": 1.1, "zorder": 9}
            self.axes[0].scatter(*x[:, [0, 2, 1]].T, depthshade=False, **style)
            if not self.figure.legends:
                mark = self.axes[0].plot([], [], "*", c="white", ms=13, mec="black", mew=1.1, label="virtual nodes")
                self.figure.legend(handles=mark, loc="upper left", fontsize=10, frameon=False)
        if len(self.axes) > 1:
            self._view(self.axes[1], shot.true, shot.true_colour)
            self.axes[1].set_title("true" if shot.true is not None else "true: the data end before", fontsize=11)
        self.figure.canvas.draw()
        return np.asarray(self.figure.canvas.buffer_rgba())[..., :3].copy()

    def _view(self, axes: Any, x: np.ndarray | None, colour: np.ndarray | None) -> None:
        axes.clear()
        axes.computed_zorder = False
        plots.view(axes, self.low, self.high, zoom=1.08)
        axes.tick_params(labelsize=7, pad=-2)
        if self.box is not None:
            for ends in self._edges(self.box):
                axes.plot(*ends[:, [0, 2, 1]].T, color="0.4", lw=0.8, zorder=0.5)
        if x is not None:
            c = GREY if colour is None else self.paint(colour)
            axes.scatter(*self._inside(x)[:, [0, 2, 1]].T, c=c, s=self.size, linewidths=0, depthshade=False)

    def _edges(self, box: np.ndarray) -> Iterator[np.ndarray]:
        """The box's twelve edges as far as they are in the view, each (2, 3)."""
        corners = np.clip(box, self.low, self.high)
        for axis in range(3):
            for one, two in itertools.product((0, 1), repeat=2):
                ends = np.empty((2, 3))
                ends[:, axis] = corners[:, axis]
                ends[:, (axis + 1) % 3], ends[:, (axis + 2) % 3] = corners[one, axis - 2], corners[two, axis - 1]
                if self.high[1] == box[1, 1] or (ends[:, 1] < self.high[1]).any():
                    yield ends  # all but the lid of a box that is higher than the view

    def _inside(self, x: np.ndarray) -> np.ndarray:
        """x, with NaN for what lies outside the view: matplotlib would draw it across the page."""
        return np.where(np.all((x >= self.low) & (x <= self.high), axis=1, keepdims=True), x, np.nan)

    def close(self) -> None:
        plots.pyplot().close(self.figure)


def run_render(path: Path, out: Path | None, fps: float, every: int, colour: str) -> None:
    """Render a rollout to ``out``, by default the MP4 beside it. Raises Failure for what cannot be."""
    out = path.with_suffix(".mp4") if out is None else out
    if colour not in COLOURS:
        raise Failure(f"--colour {colour}: use one of {', '.join(COLOURS)}")
    if not (every >= 1 and 0 < fps <= 1000):
        raise Failure(f"--every {every} --fps {fps:g}: must be at least 1; above 0 and at most 1000")
    if out.suffix not in video.SINKS:
        raise Failure(f"--out {out}: must end in .mp4 or .gif; a name without an ending is a folder of PNG")
    if out.exists():
        raise Failure(f"{out}: exists; remove it or choose another --out")
    if out.suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise Failure(
            f"{out}: MP4 needs the program ffmpeg, which is not here; --out {out.with_suffix('.gif')} needs none"
        )
    plots.pyplot()  # says what is missing before any work
    with Rollout(path) as rollout:
        if not len(rollout):
            raise Failure(f"{path}: no frame; roll out again")
        shots = Shots(rollout, every, colour)
        camera = Camera(shots, colour)
        try:
            with video.whole(out, fps) as sink, progress_bar("rendering", len(shots)) as tick:
                for shot in shots:
                    sink.add(camera.draw(shot))
                    tick()
        finally:
            camera.close()
    drawn = f"; {len(shots.rows):,} of {rollout.nodes:,} nodes drawn" if len(shots.rows) < rollout.nodes else ""
    print(f"{out}: {len(shots)} pictures, coloured by {colour}{drawn}")
