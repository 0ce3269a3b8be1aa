"""Velocities that a file does not store, and the scale at which a model sees them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from dist_egnn.partition import store_writer

import dist_egnn
from dist_egnn import Store, Trajectories, Writer, config
from dist_egnn.data.dataset import open_dataset
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.train import checkpoint, trainer

DT = 0.25
SETTINGS = ["data.radius=0.5", "data.features=[speed,mass]", "model.hidden=8", "model.layers=2", "train.epochs=2"]


def write(path: Path, velocity_unit: float = 0.0, **more: np.ndarray) -> Path:
    """Three trajectories of 20 nodes, 8 frames, that fall. velocity_unit: stored velocities are (length per time) · this."""
    attributes = {"mass": np.arange(20.0) / 10, **more}
    with Writer(path, {}) as out:
        for k, split in enumerate(("train", "valid", "test")):
            draw, t = np.random.default_rng(k), DT * np.arange(8)[:, None, None]
            u, g = draw.normal(size=(20, 3)), np.array([0, 0, -0.4])
            velocity = (u + g * t) * velocity_unit if velocity_unit else None
            x = draw.uniform(size=(20, 3)) + 0.1 * (u * t + g * t**2 / 2)
            out.add(x, split=split, dt=DT, source="test", velocity=velocity, attributes=attributes)
    return path


def load(tmp_path: Path, *overrides: str, data: str = "a.h5") -> config.Config:
    return config.load(None, [f"data.path={tmp_path / data}", f"run.dir={tmp_path / 'run'}", *SETTINGS, *overrides])


def test_backward_differences_are_per_time_and_begin_at_frame_1(tmp_path: Path) -> None:
    data = Trajectories(write(tmp_path / "a.h5"))
    samples = open_dataset(load(tmp_path, "data.horizon=1", "data.velocity_scale=2"), 0, 1)
    assert samples.frames[:7] == [(0, t) for t in range(1, 7)] + [(1, 1)]
    for number, (k, t) in enumerate(samples.frames):
        expected = 2 * (data.position(k, t) - data.position(k, t - 1)) / DT
        np.testing.assert_allclose(samples[number].ndata["v"], expected, rtol=1e-6)
        np.testing.assert_allclose(samples[number].ndata["f"][:, 0], np.linalg.norm(expected, axis=1), rtol=1e-6)


def test_an_input_that_contains_its_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.h5")
    with pytest.raises(
        Failure, match=r"data\.horizon=1 with data\.velocity=forward: .*a\.h5 .*data\.velocity=backward"
    ):
        open_dataset(load(tmp_path, "data.horizon=1", "data.velocity=forward"), 0, 1)
    assert open_dataset(load(tmp_path, "data.horizon=2", "data.velocity=forward"), 0, 1).frames[0] == (0, 0)
    with Writer(tmp_path / "stored.h5", {}) as out:  # v is the displacement
        for k, split in enumerate(("train", "valid")):
            x = np.cumsum(np.random.default_rng(k).normal(scale=0.05, size=(6, 20, 3)), 0)
            v = np.diff(x, axis=0, append=x[-1:])
            out.add(x, split=split, dt=1.0, source="test", velocity=v, attributes={"mass": np.ones(20)})
    trainer.train(SingleProcess(), load(tmp_path, "data.horizon=1", data="stored.h5"))
    assert "stored.h5: trajectory 0, frame 0: x + t·v is the target" in capsys.readouterr().err


def test_the_unit_of_velocity_changes_nothing(tmp_path: Path) -> None:
    """Data in length per time and in length per frame train to the same error; the scale is in the checkpoint."""
    results, scales = [], []
    for name, unit in (("a", 1.0), ("b", DT / 1024)):
        write(tmp_path / f"{name}.h5", unit)
        settings = load(tmp_path, "data.horizon=2", f"run.dir={tmp_path / name}", data=f"{name}.h5")
        results.append(trainer.train(SingleProcess(), settings)["best_valid_mse"])
        scales.append(
            checkpoint.load(tmp_path / name / "best.pt")["config"].partition("velocity_scale: ")[2].split()[0]
        )
        assert config.load(tmp_path / name / "config.yaml").data.velocity_scale == float(scales[-1])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    data = Trajectories(tmp_path / "a.h5")
    moved = np.square([data.position(0, t + 2).astype(float) - data.position(0, t) for t in range(6)]).mean()
    expected = np.sqrt(moved / np.square([data.velocity(0, t).astype(float) for t in range(6)]).mean())
    assert float(scales[0]) == pytest.approx(expected, rel=1e-6)
    assert float(scales[1]) == pytest.approx(1024 / DT * expected, rel=1e-6)
    x, v, given = data.position(2, 0), data.velocity(2, 0), {"mass": data.attribute(2, "mass")}
    one, other = (dist_egnn.load(tmp_path / name)(x, v * unit, given) for name, unit in (("a", 1), ("b", DT / 1024)))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_store_records_its_velocities(tmp_path: Path) -> None:
    settings = load(tmp_path, "data.horizon=2")
    data = Trajectories(write(tmp_path / "a.h5"))
    inputs = store_writer.build_inputs(data, parts=2, method="morton", settings=settings.data)
    store_writer.write_store(data, tmp_path / "store", inputs, lambda *_: None)
    plain, scale = open_dataset(settings, 0, 1), Store(tmp_path / "store").inputs["velocity_scale"]
    assert (
        scale
        == plain.velocity_scale
        == open_dataset(load(tmp_path, "data.horizon=2", data="store"), 0, 2).velocity_scale
    )
    np.testing.assert_array_equal(Store(tmp_path / "store").whole(1).ndata["v"], plain[1].ndata["v"])
    for key, value in (("velocity", "forward"), ("velocity_scale", "1")):
        with pytest.raises(Failure, match=rf"data\.{key}={value}.* was made with"):
            open_dataset(load(tmp_path, "data.horizon=2", f"data.{key}={value}", data="store"), 0, 2)


def test_runs_of_older_versions_keep_the_published_convention(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {horizon: 2}\n")
    for old in (config.load(tmp_path / "config.yaml", published=True), config.parse("data: {horizon: 2}", "a")):
        assert (old.data.velocity, old.data.velocity_scale) == ("forward", 1.0)


@pytest.mark.parametrize(
    ("overrides", "unit", "more", "message"),
    [
        (["data.velocity_scale=1", "data.features=[mass]"], 60, {}, r"v has rms 5.*; set data\.velocity_scale=null"),
        ([], 1, {"mass": np.arange(20.0) * 10}, r"data\.features: 'mass' has rms 1.1e\+02, far from 1; use mass/max"),
        (
            ["data.features=[speed]", "data.node_attributes=[mass]"],
            1,
            {"mass": np.arange(20.0) / 1e5},
            r"'mass' has rms",
        ),
        ([], 1, {"mass": np.full(20, 1e-6)}, ""),  # a small constant does no harm
        ([], 1e6, {}, ""),
    ],
)
def test_warnings_about_scales(tmp_path, overrides, unit, more, message, capsys) -> None:
    write(tmp_path / "a.h5", unit, **more)
    trainer.train(SingleProcess(), load(tmp_path, "data.horizon=2", "train.epochs=1", *overrides))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == bool(message), lines
    if message:
        assert re.search(rf"a\.h5: trajectory 0, frame 0: .*{message}", lines[0])
