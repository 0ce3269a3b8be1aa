"""Films of rollouts: what a picture shows, the three kinds of film, and what leaves nothing behind."""

from __future__ import annotations

import gc
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_egnn.errors import Failure
from dist_egnn.evaluate.vtkhdf import Frame, Rollout, RolloutWriter, finish
from dist_egnn.viz import render
from dist_egnn.viz.render import Shots, ranges, run_render

BOX = np.array([[-1.0, -1, -1], [1.0, 3, 1]])
HORIZON, DT = 2, 0.5


def true_position(x0: np.ndarray, frame: int) -> np.ndarray:
    return x0 + 0.01 * frame**2 * np.array([1.0, 0, 0])


def write(path: Path, *, nodes: int = 60, frames: int = 7, known: int = 8, virtual: int = 2) -> Path:
    """A rollout that drifts off from a truth known up to frame ``known`` - 1, stored velocities, two parts."""
    draw = np.random.default_rng(1)
    x0 = draw.uniform(-0.8, 0.8, (nodes, 3))
    meta = {"start": 0, "horizon": HORIZON, "dt": DT, "true_frames": known, "velocity": "stored"}
    out = RolloutWriter(path, frames, nodes, meta, {}, BOX, virtual, np.dtype(np.float64))
    for step in range(frames):
        y = true_position(x0, HORIZON * step)
        error = 0.05 * step * draw.normal(size=(nodes, 3))
        v = np.full((nodes, 3), 0.1 * step)
        z = np.full((virtual, 3), 0.1 * step) if step and virtual else None
        out.add(y + error, v, (x0[:, 0] > 0).astype(int), error if HORIZON * step < known else None, z)
    out.close()
    finish(path)
    return path


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(render, "DPI", 64)


@pytest.fixture
def rolled(tmp_path) -> Path:
    return write(tmp_path / "a.vtkhdf")


def film(path: Path, out: str, every: int = 1, colour: str = "speed", fps: float = 5.0) -> Path:
    target = path.parent / out
    run_render(path, target, fps, every, colour)
    return target


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_shots_by_their_definition(rolled, every):
    with Rollout(rolled) as rollout:
        shots = {c: list(Shots(rollout, every, c)) for c in render.COLOURS}
        frames = list(rollout)
    assert [s.frame.step for s in shots["speed"]] == list(range(0, 7, every))
    assert len(Shots(rollout, every, "part")) == len(shots["part"])
    for speed, error, part in zip(*shots.values(), strict=True):
        frame = frames[speed.frame.step]
        np.testing.assert_allclose(speed.colour, np.linalg.norm(frame.velocity, axis=1))
        np.testing.assert_array_equal(part.colour, frame.part)
        if frame.frame >= 8:  # the data end
            assert (speed.true, speed.true_colour, speed.mse) == (None, None, None)
            assert np.isnan(error.colour).all()
            continue
        y = frame.position - frame.error
        np.testing.assert_allclose(speed.true, y)
        np.testing.assert_allclose(error.colour, np.linalg.norm(frame.error, axis=1))
        assert speed.mse == pytest.approx((frame.error**2).mean())
        if frame.step:  # a difference over one step, however many frames are skipped
            expected = (0.01 * (frame.frame**2 - (frame.frame - HORIZON) ** 2)) / (HORIZON * DT)
            np.testing.assert_allclose(speed.true_colour, expected, rtol=1e-6)


def test_the_view_holds_what_is_drawn(tmp_path):
    for name, virtual in (("a", 0), ("b", 2)):
        with Rollout(write(tmp_path / f"{name}.vtkhdf", virtual=virtual)) as rollout:
            low, high, top = ranges(Shots(rollout, 1, "speed"), BOX)
            assert (low <= BOX[0]).all()
            assert (high[[0, 2]] >= BOX[1, [0, 2]]).all()
            assert high[1] < BOX[1, 1]  # no empty air
            assert np.linalg.norm(low - BOX[0]) < 0.3 * np.linalg.norm(BOX[1] - BOX[0])
            assert top >= 0.6 * np.sqrt(3) * 0.99
            low, high, _ = ranges(Shots(rollout, 1, "speed"), None)
            lost = [((f.position < low) | (f.position > high)).any(1).sum() for f in rollout]
            assert max(lost) <= 2


def test_folder_of_png(rolled, capsys):
    out = film(rolled, "frames", every=2)
    assert sorted(f.name for f in out.iterdir()) == [f"frame-{k:04d}.png" for k in range(4)]
    assert f"{out}: 4 pictures, coloured by speed" in capsys.readouterr().out
    shown = [read(f) for f in sorted(out.iterdir())]
    assert len({p.shape for p in shown}) == 1
    coloured = [np.ptp(p, axis=2) > 60 for p in shown]  # nodes: neither axes nor text
    middle = shown[0].shape[1] // 2 - 20
    left, right = (
        [c[:, s].sum() for c in coloured] for s in (slice(0, middle), slice(middle, int(0.86 * shown[0].shape[1])))
    )
    assert min(left) > 300
    assert min(right[:2]) > 300
    assert max(right[2:]) == 0  # the data end after step 3
    assert all((shown[k] != shown[k + 1]).any() for k in range(3))
    assert [f.name for f in rolled.parent.iterdir() if "partial" in f.name] == []


def test_without_a_truth_there_is_one_view(tmp_path):
    path = write(tmp_path / "a.vtkhdf", known=1, virtual=0)
    shape = read(film(path, "one", every=6) / "frame-0000.png").shape
    both = read(film(write(tmp_path / "b.vtkhdf"), "two", every=6) / "frame-0000.png").shape
    assert shape[1] < 0.6 * both[1]
    with pytest.raises(Failure, match="no true frame"):
        film(path, "three", colour="error")


@pytest.mark.parametrize("colour", ["error", "part"])
def test_colours(rolled, colour):
    out = film(rolled, "frames", every=3, colour=colour)
    first, last = read(out / "frame-0001.png"), read(out / "frame-0002.png")
    half = first.shape[1] // 2 - 20
    seen = [int((np.ptp(p[:, :half], axis=2) > 60).sum()) for p in (first, last)]
    # without a truth the nodes are grey, but parts are known
    assert seen[0] > 300
    assert (seen[1] > 300) == (colour == "part")


def test_gif_holds_the_same_pictures(rolled):
    gif = Image.open(film(rolled, "a.gif", every=2, fps=4))
    assert (gif.n_frames, gif.info["loop"]) == (4, 0)
    for k, file in enumerate(sorted(film(rolled, "frames", every=2).iterdir())):
        gif.seek(k)
        assert gif.info["duration"] == 250
        assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - read(file)).mean() < 1


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")
def test_mp4_holds_the_same_pictures(rolled):
    out = film(rolled, "a.mp4", every=2)
    raw = subprocess.run(
        ["ffmpeg", "-loglevel", "error", "-i", str(out), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True,
        check=True,
    ).stdout
    files = sorted(film(rolled, "frames", every=2).iterdir())
    height, width = (side // 2 * 2 for side in read(files[0]).shape[:2])
    shown = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    assert len(shown) == 4
    for picture, file in zip(shown, files, strict=True):
        assert np.abs(picture.astype(int) - read(file)[:height, :width]).mean() < 4
    assert [f.name for f in rolled.parent.iterdir() if "partial" in f.name] == []


def test_many_nodes_are_thinned_and_it_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(render, "SHOWN", 50)
    path = write(tmp_path / "a.vtkhdf", nodes=200, frames=2)
    film(path, "frames", every=2)
    assert "50 of 200 nodes drawn" in capsys.readouterr().out
    with Rollout(path) as rollout:
        shots = Shots(rollout, 1, "speed")
        assert len(set(shots.rows)) == 50
        assert all(len(s.position) == len(s.colour) == 50 for s in shots)


def test_frames_come_one_by_one(rolled, monkeypatch):
    alive = []

    def draw(self, shot):
        alive.append(sum(isinstance(o, Frame) for o in gc.get_objects()))
        return np.zeros((4, 6, 3), np.uint8)

    monkeypatch.setattr(render.Camera, "draw", draw)
    film(rolled, "frames")
    assert len(alive) == 7
    assert max(alive) <= 2


def test_mistakes(rolled, monkeypatch):
    (rolled.parent / "there.gif").write_text("mine")
    before = {f.name for f in rolled.parent.iterdir()}
    for given, says in (
        ({"out": "there.gif"}, "exists; remove it"),
        ({"out": "a.avi"}, r"must end in \.mp4 or \.gif"),
        ({"out": "a.gif", "colour": "red"}, "use one of speed, error, part"),
        ({"out": "a.gif", "every": 0}, "at least 1"),
        ({"out": "a.gif", "fps": 0}, "above 0"),
    ):
        with pytest.raises(Failure, match=says):
            film(rolled, **given)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Failure, match=r"needs the program ffmpeg, which is not here; --out .*/a\.gif needs none"):
        run_render(rolled, None, 5, 1, "speed")
    assert {f.name for f in rolled.parent.iterdir()} == before
    assert (rolled.parent / "there.gif").read_text() == "mine"


def test_ffmpeg_that_fails_is_told_of(rolled, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").write_text("#!/bin/sh\necho no such encoder >&2\nexit 3\n")
    (tmp_path / "bin" / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    before = {f.name for f in tmp_path.iterdir()}
    with pytest.raises(Failure, match=r"ffmpeg failed \(no such encoder\); write a \.gif"):
        film(rolled, "a.mp4")
    assert {f.name for f in tmp_path.iterdir()} == before


@pytest.mark.parametrize("out", ["a.gif", "a.mp4", "a"])
def test_what_is_interrupted_leaves_nothing(rolled, monkeypatch, out):
    if out.endswith("mp4") and shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg here")
    drawn = iter([np.zeros((4, 6, 3), np.uint8)] * 2)

    def draw(self, shot):
        try:
            return next(drawn)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(render.Camera, "draw", draw)
    before = {f.name for f in rolled.parent.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        film(rolled, out)
    assert {f.name for f in rolled.parent.iterdir()} == before
