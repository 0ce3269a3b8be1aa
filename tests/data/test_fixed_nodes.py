"""data.fixed: nodes that do not move count neither in the loss nor in errors, and stay in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dist_egnn.partition import store_writer

import dist_egnn
from dist_egnn import Store, Trajectories, Writer, config
from dist_egnn.config import Loss
from dist_egnn.data.dataset import open_dataset
from dist_egnn.data.fixed_nodes import fixed_nodes
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.evaluate import rollout
from dist_egnn.train import checkpoint, losses, trainer

WALL = np.arange(60) % 3 == 0
MOVES = 0.03 * np.random.default_rng(1).normal(size=(60, 3)) * ~WALL[:, None]  # a frame
SETTINGS = [
    "data.velocity_scale=1",
    "data.radius=0.4",
    "data.horizon=2",
    "data.features=[speed]",
    "model.name=Linear",
    "data.fixed=kind=3",
]


@pytest.fixture
def run(tmp_path: Path) -> config.Config:
    """A run of the model x + 1.5 v on two trajectories; kind is 3 for the nodes of WALL, which rest."""
    x = np.random.default_rng(0).uniform(size=(60, 3)) + MOVES * np.arange(6)[:, None, None]
    attributes = {"kind": 3.0 * WALL, "wall": 1.0 * WALL, "mass": np.arange(60.0), "all": np.ones(60)}
    attributes["varies"] = np.tile(WALL, (6, 1))
    with Writer(tmp_path / "a.h5", {}) as out:
        for split in ("train", "valid", "test"):
            out.add(x, split=split, dt=1.0, source="test", velocity=np.tile(MOVES, (6, 1, 1)), attributes=attributes)
    settings = config.load(None, [f"data.path={tmp_path / 'a.h5'}", f"run.dir={tmp_path / 'run'}", *SETTINGS])
    model = trainer.build_model(settings, (1, 0), SingleProcess())
    model.t.data.fill_(1.5)
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run" / "best.pt", checkpoint.weights_only(model, settings))
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml(settings))
    return settings


@pytest.mark.parametrize(("text", "chosen"), [("kind=3", WALL), ("wall", WALL), ("wall=0", ~WALL)])
def test_names_of_nodes(text: str, chosen: np.ndarray) -> None:
    np.testing.assert_array_equal(fixed_nodes(text, {"kind": 3.0 * WALL, "wall": 1.0 * WALL}.__getitem__), chosen)


def test_errors_are_means_over_the_nodes_that_move(run: config.Config, tmp_path: Path) -> None:
    mse = np.square(MOVES[~WALL]).mean()  # of an error of one frame
    errors = trainer.evaluate(SingleProcess(), run, tmp_path / "run" / "best.pt")
    assert errors["static"] == pytest.approx(4 * mse, rel=1e-5)
    assert errors["Linear (trained)"] == pytest.approx(0.25 * mse, rel=1e-5)
    table = rollout.run_rollout(tmp_path / "run", trajectory=2, steps=1, out=tmp_path / "o.vtkhdf")
    assert table["mse"][1] == pytest.approx(0.25 * mse, rel=1e-5)
    assert table["static_mse"][1] == pytest.approx(4 * mse, rel=1e-5)


def test_loss_of_parts_is_that_of_the_nodes_that_move(run: config.Config, tmp_path: Path) -> None:
    data = Trajectories(tmp_path / "a.h5")
    inputs = store_writer.build_inputs(data, parts=3, method="morton", settings=run.data)
    store_writer.write_store(data, tmp_path / "store", inputs, lambda *_: None)
    store, model, z = Store(tmp_path / "store"), trainer.build_model(run, (1, 0), SingleProcess()), torch.rand(1, 2, 3)
    parts, moving, mse = [store.read(0, p) for p in range(3)], torch.tensor([[40.0]]), 0.0
    generator = torch.Generator()
    mmd = [losses.mmd(z, g, moving, Loss(samples=4), generator.manual_seed(2)) for g in (*parts, store.whole(0))]
    for graph in parts:
        mse += float(trainer.compute_loss(run, model, graph, SingleProcess(), generator)[1])
    assert mse == pytest.approx(np.square(MOVES[~WALL]).mean(), rel=1e-5)  # of x + v, half of the way
    assert float(sum(mmd[:3])) == pytest.approx(float(mmd[3]), rel=1e-5)
    only = dist_egnn.Trajectories(tmp_path / "a.h5").position(0, 2)[~WALL]  # MMD of a graph without the walls
    drawn = losses.draw(40, 8, generator.manual_seed(2))
    settings = Loss(samples=4)
    cross = losses.kernel(torch.from_numpy(only)[drawn][:, None], z, settings.sigma, settings.kernel).mean()
    virtual = losses.kernel(z[0, :, None], z, settings.sigma, settings.kernel).mean()
    assert float(mmd[3]) == pytest.approx(float(virtual - 2 * cross), rel=1e-5)


def test_prediction_leaves_them_in_place(run: config.Config, tmp_path: Path) -> None:
    predict, x = dist_egnn.load(tmp_path / "run"), np.random.default_rng(3).uniform(size=(60, 3)).astype(np.float32)
    v = np.ones_like(x)
    np.testing.assert_allclose(predict(x, v, {"kind": 3 * WALL}), x + 1.5 * ~WALL[:, None], rtol=1e-6)
    with pytest.raises(Failure, match="'kind' is missing"):
        predict(x, v, {})


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ("mass", r"a\.h5: trajectory 0, frame 0: node 1 moves, and data\.fixed"),
        ("kind=4", r"data\.fixed=kind=4: .*a\.h5 has no such node"),
        ("sort", r"a\.h5: trajectory 0 has no node attribute 'sort'"),
        ("varies", r"data\.fixed=varies: .* varies over time; use another attribute"),
        ("wall=x", r"data\.fixed=wall=x: write NAME, or NAME=VALUE"),
    ],
)
def test_wrong_names_are_refused(run: config.Config, fixed: str, message: str) -> None:
    with pytest.raises(Failure, match=message):
        open_dataset(config.load(None, [f"data.path={run.data.path}", *SETTINGS, f"data.fixed={fixed}"]), 0, 1)[0]
