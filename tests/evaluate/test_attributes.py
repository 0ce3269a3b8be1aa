"""Attributes of several columns and attributes that vary over time, from the file through store, training and rollout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dist_egnn.partition import store_writer
from small_data import FRAMES, falling_swirl

import dist_egnn
from dist_egnn import config
from dist_egnn.data.dataset import open_dataset
from dist_egnn.data.store import Store
from dist_egnn.data.trajectories import Trajectories, Writer
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_check, rollout
from dist_egnn.evaluate.vtkhdf import Rollout
from dist_egnn.train import trainer

SETTINGS = [
    "data.radius=0.3",
    "data.horizon=3",
    "data.features=[kind,heat/max,speed]",
    "data.node_attributes=[kind,heat]",
]
SETTINGS += ["model.hidden=4", "model.layers=1", "train.epochs=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run beside its data a.h5: 60 nodes, the one-hot `kind` (60, 2) and `heat` (14, 60), which varies."""
    here = tmp_path_factory.mktemp("attributes")
    with Writer(here / "a.h5", {}) as out:
        for seed, split in enumerate(["train", "valid", "test"]):
            x, v, _ = falling_swirl(60, seed)
            attributes = {
                "kind": np.eye(2)[np.arange(60) % 2],
                "mass": np.ones((60, 2)),  # no feature
                "heat": np.random.default_rng(seed).uniform(size=(FRAMES, 60)),
            }
            out.add(x, split=split, dt=1.0, source="test", velocity=v, attributes=attributes)
    trainer.train(SingleProcess(), load(here))
    return here / "run"


def load(here: Path, *more: str) -> config.Config:
    return config.load(None, [*SETTINGS, f"data.path={here / 'a.h5'}", f"run.dir={here / 'run'}", *more])


def test_a_store_has_the_columns_of_the_file(run, tmp_path):
    settings, data = load(run.parent), Trajectories(run.parent / "a.h5")
    inputs = store_writer.build_inputs(data, parts=2, method="metis", settings=settings.data)
    assert inputs.widths == (4, 3)
    store_writer.write_store(data, tmp_path / "store", inputs, lambda *_: None)
    store, samples = Store(tmp_path / "store"), open_dataset(settings, 0, 1)
    assert samples.widths == open_dataset(load(run.parent, f"data.path={tmp_path / 'store'}"), 0, 2).widths == (4, 3)
    for number in (0, 5):
        whole, sample = store.whole(number), samples[number]
        for name in ("f", "a"):
            np.testing.assert_array_equal(whole.ndata[name], sample.ndata[name])
    assert max(parallel_check.compare(settings, store, 0, tmp_path).values()) < parallel_check.TOLERANCE


def test_a_rollout_reads_attributes_while_they_last(run, tmp_path, capsys):
    """As a loop over the predictor with the attributes of each input frame; no step needs frames after the last."""
    data, predict = Trajectories(run.parent / "a.h5"), dist_egnn.load(run)
    rollout.run_rollout(run, trajectory=2, steps=5, out=tmp_path / "a.vtkhdf", start=1)
    assert "energies are those of mass 1" in capsys.readouterr().err
    x, v = data.position(2, 1), data.velocity(2, 1)
    with Rollout(tmp_path / "a.vtkhdf") as frames:
        assert list(frames.attributes) == ["kind", "mass"]
        np.testing.assert_array_equal(frames.attributes["kind"], data.attribute(2, "kind"))
        for step, frame in enumerate(frames):
            np.testing.assert_allclose(frame.position, x, atol=1e-6)
            if step < 5:
                now = {name: data.attribute(2, name, 1 + 3 * step) for name in ("kind", "heat")}
                y = predict(x, v, now)
                x, v = y, (y - x) / 3
    with pytest.raises(Failure, match=r"--steps 6: the model uses 'heat', .* up to frame 13 of .*; use at most 5"):
        rollout.run_rollout(run, trajectory=2, steps=6, out=tmp_path / "b.vtkhdf", start=1)
    with pytest.raises(Failure, match=r"'kind' is missing"):
        predict(x, v, {"heat": np.ones(60)})
    with pytest.raises(Failure, match=r"the model uses 4 columns \(kind, heat/max, speed\); given are 3"):
        predict(x, v, {"kind": np.ones(60), "heat": np.ones(60)})
