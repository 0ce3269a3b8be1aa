"""tools/demo.py: what its picture and its table show of a rollout, and which folders it replaces."""

from __future__ import annotations

import demo
import numpy as np
import pytest

from dist_egnn.errors import Failure
from dist_egnn.evaluate.step_errors import error_table
from dist_egnn.evaluate.vtkhdf import RolloutWriter, finish

BOX = np.array([[-1.0, 0.0, -1.0], [1.0, 3.0, 1.0]])
ERROR = np.array([3e-3, 4e-3, 0.0])  # 5 mm


def test_picture_and_distances(tmp_path, monkeypatch):
    """Nodes at 1 m/s along x, predicted 5 mm away from step 1 on."""
    path, dt, frames = tmp_path / "rollout.vtkhdf", 0.01, demo.STEPS + 1
    meta = {"start": 0, "horizon": 1, "dt": dt, "true_frames": frames, "velocity": "backward differences"}
    start = np.random.default_rng(0).uniform(0, 0.5, (7, 3))
    true = start + np.arange(frames)[:, None, None] * dt * np.array([1.0, 0.0, 0.0])
    with RolloutWriter(path, (frames, 7, 0), meta | {"gravity": [0, 0, 0]}, {}, BOX, np.dtype(np.float64)) as out:
        for step, x in enumerate(true):
            error = ERROR * (step > 0)
            out.add(x + error, np.tile([1.0, 0, 0], (7, 1)), np.zeros(7), np.tile(error, (7, 1)), None)
    finish(path)
    table, figures = error_table(path), []
    assert demo.rms_mm(table["mse"])[demo.LISTED].tolist() == pytest.approx([5.0] * len(demo.LISTED))

    monkeypatch.setattr(demo.plots, "png", figures.append)
    demo.picture(path, table, "title")
    drawn = [axes.collections[0] for axes in figures[0].axes if axes.collections]
    for row, error in enumerate((0, ERROR)):
        for column, step in enumerate(demo.DRAWN):
            dots = drawn[row * len(demo.DRAWN) + column]
            order = np.argsort(true[step, :, 2])
            assert np.allclose(dots.get_offsets(), (true[step] + error)[order, :2])
            assert np.allclose(dots.get_array(), 1.0)  # m/s


@pytest.mark.parametrize("left", ["store.partial/part", "store/manifest.yaml"])
def test_output_of_an_earlier_demo_is_replaced(tmp_path, left):
    (tmp_path / "out" / left).parent.mkdir(parents=True)
    (tmp_path / "out" / left).touch()
    demo.check_output(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(Failure, match=f"{tmp_path}.*--out"):
        demo.check_output(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
