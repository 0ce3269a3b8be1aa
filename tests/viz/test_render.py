"""Videos of rollouts: the pictures, the three formats, and no files left after errors."""

from __future__ import annotations

import gc
import shutil
import subprocess
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageSequence

from dist_egnn.errors import Failure
from dist_egnn.evaluate.vtkhdf import Frame, Rollout, RolloutWriter, finish
from dist_egnn.viz import plots, render
from dist_egnn.viz.render import DrawnFrames, run_render, shared_limits
from dist_egnn.viz.rollout_figure import run_figure

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
BLACK = np.zeros((4, 6, 3), np.uint8)
BOX = np.array([[-1.0, -1, -1], [1.0, 3, 1]])
HORIZON, DT = 2, 0.5


def write(path: Path, *, nodes: int = 60, frames: int = 7, known: int = 8, virtual: int = 2) -> Path:
    """A rollout that drifts off from a truth known before frame ``known``, with stored velocities, in two parts."""
    draw = np.random.default_rng(1)
    x0 = draw.uniform(-0.8, 0.8, (nodes, 3))
    meta = {"start": 0, "horizon": HORIZON, "dt": DT, "true_frames": known, "velocity": "stored"}
    out = RolloutWriter(path, (frames, nodes, virtual), meta, {}, BOX, np.dtype(np.float64))
    for step in range(frames):
        y = x0 + 0.01 * (HORIZON * step) ** 2 * np.array([1.0, 0, 0])
        error = 0.05 * step * draw.normal(size=(nodes, 3))
        v = np.full((nodes, 3), 0.1 * step)
        z = np.full((virtual, 3), 0.1 * step) if step and virtual else None
        out.add(y + error, v, (x0[:, 0] > 0).astype(int), error if HORIZON * step < known else None, z)
    out.close()
    finish(path)
    return path


@pytest.fixture
def rolled(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(render, "DPI", 64)  # small pictures are drawn faster
    return write(tmp_path / "a.vtkhdf")


def video(path: Path, out: str, every: int = 1, colour: str = "speed", fps: float = 5.0) -> Path:
    run_render(path, path.parent / out, fps, every, colour)
    return path.parent / out


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def coloured(picture: np.ndarray) -> int:
    """The number of pixels of nodes: axes and text are grey."""
    return (np.ptp(picture, axis=2) > 60).sum()


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("every", [1, 2, 3])
def test_drawn_frames_by_their_definition(rolled, every):
    with Rollout(rolled) as rollout:
        drawn = {c: list(DrawnFrames(rollout, every, c)) for c in render.COLOURS}
        frames = list(rollout)
    assert [s.frame.step for s in drawn["speed"]] == list(range(0, 7, every))
    assert len(DrawnFrames(rollout, every, "part")) == len(drawn["part"])
    for speed, error, part in zip(*drawn.values(), strict=True):
        frame = frames[speed.frame.step]
        np.testing.assert_allclose(speed.colour, np.linalg.norm(frame.velocity, axis=1))
        np.testing.assert_array_equal(part.colour, frame.part)
        if frame.frame >= 8:  # after the end of the data
            assert (speed.true, speed.true_colour, speed.mse) == (None, None, None)
            assert np.isnan(error.colour).all()
            continue
        np.testing.assert_allclose(speed.true, frame.position - frame.error)
        np.testing.assert_allclose(error.colour, np.linalg.norm(frame.error, axis=1))
        assert speed.mse == pytest.approx((frame.error**2).mean())
        if frame.step:  # a difference over one step, however many frames are skipped
            expected = (0.01 * (frame.frame**2 - (frame.frame - HORIZON) ** 2)) / (HORIZON * DT)
            np.testing.assert_allclose(speed.true_colour, expected, rtol=1e-6)


@pytest.mark.parametrize("virtual", [0, 2])
def test_the_view_contains_what_is_drawn(tmp_path, virtual):
    with Rollout(write(tmp_path / "a.vtkhdf", virtual=virtual)) as rollout:
        low, high, top = shared_limits(DrawnFrames(rollout, 1, "speed"), BOX)
        assert (low <= BOX[0]).all()
        assert ((high >= BOX[1]) == [True, False, True]).all()  # no empty space above
        assert np.linalg.norm(low - BOX[0]) < 0.3 * np.linalg.norm(BOX[1] - BOX[0])
        assert top >= 0.6 * np.sqrt(3) * 0.99
        low, high, _ = shared_limits(DrawnFrames(rollout, 1, "speed"), None)
        assert max(((f.position < low) | (f.position > high)).any(1).sum() for f in rollout) <= 2


def test_folder_of_png(rolled, capsys):
    out = video(rolled, "frames", every=2)
    assert names(out) == {f"frame-{k:04d}.png" for k in range(4)}
    assert f"{out}: 4 pictures, coloured by speed" in capsys.readouterr().out
    shown = [read(f) for f in sorted(out.iterdir())]
    assert len({p.shape for p in shown}) == 1
    middle, end = shown[0].shape[1] // 2 - 20, int(0.86 * shown[0].shape[1])
    left, right = ([coloured(p[:, s]) for p in shown] for s in (slice(0, middle), slice(middle, end)))
    assert min(*left, *right) > 80  # also after step 3, where the data end
    assert len({p.tobytes() for p in shown}) == 4
    assert all((shown[k] != shown[k + 1]).any() for k in range(3))
    assert names(rolled.parent) == {"a.vtkhdf", "frames"}
    for colour in ("error", "part"):  # without a truth, errors are grey, but parts are known
        out = video(rolled, colour, every=3, colour=colour)
        first, last = (coloured(read(out / f"frame-000{k}.png")[:, :middle]) for k in (1, 2))
        assert (first > 80, last > 80) == (True, colour == "part")


def test_no_text_or_view_crosses_the_border(tmp_path, monkeypatch):
    """Whatever the length of the title, which the smallest pictures have no space for."""
    monkeypatch.setattr(render, "NARROWEST", 1.0)
    monkeypatch.setattr(render, "MAX_POINTS", 50)
    with Rollout(write(tmp_path / "a.vtkhdf", frames=5)) as rollout:
        camera = render.Camera(DrawnFrames(rollout, 2, "error"))
        for picture in camera.pictures():
            assert (np.concatenate([picture[[0, -1]], picture[:, [0, -1]].swapaxes(0, 1)], 1) == 255).all()
            assert picture[:30].min() < 100


def test_the_label_of_virtual_nodes():
    axes = plots.pyplot().figure().add_subplot(projection="3d")
    axes.set(xlim=(0, 10), ylim=(0, 1), zlim=(0, 1))
    a, b, gone = [1.0, 0, 0], [1.0, 0.5, 0], [np.nan] * 3
    near = [1.1, 0, 0]
    for z, label in (
        ([a], "1 virtual node"),
        ([a, b], "2 virtual nodes"),
        ([a, near, a], "3 virtual nodes at one point"),
        ([a, b, near, gone], "4 virtual nodes at 2 points, 1 outside the view"),
        ([gone], "1 virtual node, 1 outside the view"),
    ):
        assert plots.draw_virtual_nodes(axes, np.array(z), 10) == label
    plots.pyplot().close(axes.figure)


def test_without_a_truth_there_is_one_view(tmp_path):
    path = write(tmp_path / "a.vtkhdf", known=1, virtual=0)
    one = read(video(path, "one", every=6) / "frame-0000.png")
    two = read(video(write(tmp_path / "b.vtkhdf"), "two", every=6) / "frame-0000.png")
    assert one.shape[1] < 0.7 * two.shape[1]
    with pytest.raises(Failure, match="--colour error"):
        video(path, "three", colour="error")


@pytest.mark.parametrize("out", ["a.gif", pytest.param("a.mp4", marks=needs_ffmpeg)])
def test_a_video_has_the_pictures_of_the_folder(rolled, out):
    path = video(rolled, out, every=2, fps=4)
    pictures = np.stack([read(file) for file in sorted(video(rolled, "frames", every=2).iterdir())])
    if out == "a.gif":
        gif = Image.open(path)
        assert (gif.n_frames, gif.info["loop"], gif.info["duration"]) == (4, 0, 250)
        shown = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)])
    else:
        command = ["ffmpeg", "-loglevel", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        pictures = pictures[:, : pictures.shape[1] // 2 * 2, : pictures.shape[2] // 2 * 2]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
        shown = np.frombuffer(raw, np.uint8).reshape(pictures.shape)
    assert np.abs(shown.astype(int) - pictures).mean((1, 2, 3)).max() < (1 if out == "a.gif" else 4)
    assert names(rolled.parent) == {"a.vtkhdf", out, "frames"}


def test_some_of_many_nodes_are_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(render, "MAX_POINTS", 50)
    path = write(tmp_path / "a.vtkhdf", nodes=200, frames=2)
    video(path, "frames", every=2)
    assert "50 of 200 nodes drawn" in capsys.readouterr().out
    with Rollout(path) as rollout:
        frames = DrawnFrames(rollout, 1, "speed")
        assert len(set(frames.rows)) == 50
        assert all(len(s.position) == len(s.colour) == 50 for s in frames)


def test_frames_are_read_one_by_one(rolled, monkeypatch):
    alive = []

    def count() -> int:
        return sum(type(o) is Frame for o in gc.get_objects())

    def draw(self, drawn):
        alive.append(count())
        return BLACK

    gc.collect()
    before = count()  # of other tests

    monkeypatch.setattr(render.Camera, "draw", draw)
    video(rolled, "frames")
    assert len(alive) == 7
    assert max(alive) <= before + 2


def test_bad_arguments(rolled, monkeypatch):
    (rolled.parent / "there.gif").write_text("mine")
    for given, match in (
        ({"out": "there.gif"}, "there.gif: exists"),
        ({"out": "a.avi"}, r"\.mp4 or \.gif"),
        ({"out": "a.gif", "colour": "red"}, "--colour red: use one of speed, error, part"),
        ({"out": "a.gif", "every": 0}, "--every 0"),
        ({"out": "a.gif", "fps": 0}, "--fps 0"),
    ):
        with pytest.raises(Failure, match=match):
            video(rolled, **given)
    assert (rolled.parent / "there.gif").read_text() == "mine"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Failure, match=r"ffmpeg.* --out .*/a\.gif"):
        run_render(rolled, None, 5, 1, "speed")
    program = rolled.parent / "ffmpeg"
    program.write_text("#!/bin/sh\necho no such encoder >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{rolled.parent}:/usr/bin:/bin")
    with pytest.raises(Failure, match=r"ffmpeg failed \(no such encoder\); write a \.gif"):
        video(rolled, "a.mp4")
    assert names(rolled.parent) == {"a.vtkhdf", "there.gif", "ffmpeg"}


@pytest.mark.parametrize("out", ["a.gif", pytest.param("a.mp4", marks=needs_ffmpeg), "a"])
def test_an_interruption_leaves_nothing(rolled, monkeypatch, out):
    monkeypatch.setattr(render.Camera, "draw", Mock(side_effect=[BLACK, BLACK, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        video(rolled, out)
    assert names(rolled.parent) == {"a.vtkhdf"}


def test_one_picture_of_a_few_steps(rolled, tmp_path):
    """It shows steps, energy and errors; it needs true frames, and steps within them."""
    out = tmp_path / "a.png"
    run_figure(rolled, out, "1,3", title="two steps", units="m,s,J")
    assert coloured(read(out)) > 500
    for steps in ("0", "4", "1,x", "1,"):
        with pytest.raises(Failure, match=r"--steps .* 1 to 3"):
            run_figure(rolled, out, steps)
    with pytest.raises(Failure, match=r"--units m,s: .*m,s,J"):
        run_figure(rolled, out, units="m,s")
    with pytest.raises(Failure, match=r"no true frame.*--out"):
        run_figure(write(tmp_path / "b.vtkhdf", known=1), tmp_path / "b.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.vtkhdf", "b.vtkhdf"]


def test_what_the_picture_shows(tmp_path, monkeypatch):
    """Nodes at 1 m/s along x, predicted 5 mm away from step 1 on."""
    path, dt, frames, error = tmp_path / "rollout.vtkhdf", 0.01, 11, np.array([3e-3, 4e-3, 0.0])
    meta = {"start": 0, "horizon": 1, "dt": dt, "true_frames": frames, "velocity": "backward differences"}
    start = np.random.default_rng(0).uniform(0, 0.5, (7, 3))
    true = start + np.arange(frames)[:, None, None] * dt * np.array([1.0, 0.0, 0.0])
    with RolloutWriter(path, (frames, 7, 0), meta | {"gravity": [0, 0, 0]}, {}, BOX, np.dtype(np.float64)) as out:
        for step, x in enumerate(true):
            out.add(
                x + error * (step > 0),
                np.tile([1.0, 0, 0], (7, 1)),
                np.zeros(7),
                np.tile(error * (step > 0), (7, 1)),
                None,
            )
    finish(path)
    figures: list = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or b"")
    run_figure(path, tmp_path / "a.png", "2,10")
    drawn = [axes.collections[0] for axes in figures[0].axes if axes.collections]
    lines = {line.get_label(): line.get_ydata() for line in figures[0].axes[-1].lines}
    assert lines["predicted"] == pytest.approx(5e-3)
    for row, offset in enumerate((0, error)):
        for column, step in enumerate((2, 10)):
            dots, order = drawn[row * 2 + column], np.argsort(true[step, :, 2])
            assert np.allclose(dots.get_offsets(), (true[step] + offset)[order, :2])
            assert np.allclose(dots.get_array(), 1.0)  # m/s


def test_two_dimensions_are_seen_from_the_front(tmp_path):
    """The depth of the box means nothing: the view has none."""
    path, x = tmp_path / "flat.vtkhdf", np.random.default_rng(0).uniform(-0.9, 0.9, (20, 3)) * [1, 1, 0]
    meta = {"start": 0, "horizon": 1, "dt": 1.0, "true_frames": 2, "velocity": "stored"}
    with RolloutWriter(path, (2, 20, 0), meta, {}, BOX, np.dtype(np.float64)) as out:
        for _ in range(2):
            out.add(x, 0 * x, np.zeros(20, int), 0 * x, None)
    finish(path)
    with Rollout(path) as rollout:
        low, high, _ = shared_limits(DrawnFrames(rollout, 1, "speed"), rollout.box)
    assert plots.is_flat(low, high)
    axes = plots.pyplot().figure().add_subplot(projection="3d")
    plots.view(axes, low, high)
    assert (axes.elev, axes.azim) == (0, -90)
    plots.pyplot().close("all")
