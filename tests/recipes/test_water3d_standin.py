"""recipes/water3d: the simulated stand-in and the config of the recipe."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from gns_files import RECIPE, run

from dist_egnn import config
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.errors import Failure


@pytest.mark.parametrize("particles", [1000, 8000])
def test_scenes_fit_their_box(water3d, particles):
    scenes = [water3d.scene(0, k, particles) for k in range(300)]
    for drawn in scenes:
        box, block = np.array(drawn["box"]), np.array(drawn["block"])
        assert (block[0] >= box[0]).all()
        assert (block[1] <= box[1]).all()
        count = np.rint((block[1] - block[0]) / (2 * water3d.RADIUS) - 1).prod()
        assert abs(count / particles - 1) < 0.2
    assert scenes[0] == water3d.scene(0, 0, particles) != water3d.scene(1, 0, particles)


@pytest.mark.skipif(
    importlib.util.find_spec("pysplishsplash") is None, reason="pysplishsplash is not installed (extra fluid)"
)
def test_stand_in_falls_stays_in_its_box_and_repeats(tmp_path):
    for name, workers in (("a", 2), ("b", 1)):
        done = run("--scale", "tiny", "--out", tmp_path / f"{name}.h5", "--seed", 5, "--workers", workers)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    data = Trajectories(tmp_path / "a.h5")
    assert [trajectory.split for trajectory in data] == ["train"] * 4 + ["valid", "test"]
    for k, trajectory in enumerate(data):
        assert trajectory.source.startswith("stand-in for GNS Water-3D: SPlisHSPlasH")
        assert trajectory.gravity == (0, -9.81, 0)
        x = np.stack([data.position(k, t) for t in range(trajectory.frames)]).astype(float)
        low, high = data.box(k)
        assert (x >= low).all()
        assert (x <= high).all()
        assert (data.attribute(k, "type") == 5).all()
        v = np.diff(x, axis=0) / trajectory.dt
        height = (x[1:, :, 1] + x[:-1, :, 1]) / 2 - low[1]
        energy = ((v**2).sum(2) / 2 + 9.81 * height).mean(1)
        assert np.diff(energy).max() < 1e-3 * energy[0]
        assert energy[-1] < 0.9 * energy[0]


def test_missing_packages_name_the_command_to_install(water3d, monkeypatch, tmp_path):
    monkeypatch.setattr(water3d.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Failure, match=r"'pysplishsplash' is not installed; pip install -e '\.\[fluid\]'"):
        water3d.run(["--scale", "tiny", "--out", str(tmp_path / "a.h5")])
    (tmp_path / "train.tfrecord").touch()
    with pytest.raises(Failure, match=r"'google' is not installed; pip install -e '\.\[water3d\]'"):
        water3d.run(["--scale", "tiny", "--source", str(tmp_path), "--out", str(tmp_path / "a.h5")])


def test_config_has_the_published_values():
    settings = config.load(RECIPE / "config.yaml")
    assert (settings.data.radius, settings.data.horizon, settings.data.frames) == (0.035, 15, 15)
    assert (settings.train.lr, settings.train.weight_decay, settings.train.batch_size, settings.train.epochs) == (
        5e-4,
        1e-12,
        15,
        2000,
    )
    assert (settings.loss.sigma, settings.loss.mmd, settings.loss.samples) == (1.5, 0.01, 3)
    assert (settings.model.hidden, settings.model.layers, settings.model.virtual_nodes) == (64, 4, 3)
