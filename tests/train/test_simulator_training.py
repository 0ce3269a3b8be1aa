"""Training of simulators: data, statistics, noise, own steps, many processes, rollouts and clear errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from dist_egnn.partition import store_writer
from dist_egnn.partition.verify import verify_store
from small_data import EDGES, falling_swirl, random_pairs
from thread_ranks import run_ranks

import dist_egnn
from dist_egnn import Trajectories, Writer, config
from dist_egnn.data import domain, graphs, halo
from dist_egnn.data.dataset import open_dataset
from dist_egnn.data.store import Store
from dist_egnn.data.store_inputs import node_floats
from dist_egnn.distributed import comm, spawn
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_check, rollout, rollout_metrics, selection
from dist_egnn.evaluate.vtkhdf import Rollout
from dist_egnn.train import augmentation, checkpoint, trainer

BOX = np.array([[-0.2, -0.2, -0.2], [1.2, 1.3, 1.2]])
GRAVITY = [0.0, -0.002, 0.0]
SETTINGS = ["data.radius=0.27", "data.horizon=1", "data.history=2", "data.pushforward=2", "data.walls=box"]
SETTINGS += ["data.features=[mass]", "data.node_attributes=[mass]", "model.hidden=16", "model.layers=2", "loss.mmd=0"]
SETTINGS += ["model.predicts=acceleration", "model.normalize=true", "train.noise=0.01"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("simulator") / "data.h5"
    with Writer(path, {}) as out:
        for seed, split in enumerate(("train", "train", "valid", "test")):
            position, _, attributes = falling_swirl(120 + seed, seed)
            attributes["body"] = np.arange(120 + seed) < 20  # moves as prescribed, with data.fixed=body
            given = {"attributes": attributes, "gravity": GRAVITY, "edges": random_pairs(120 + seed, seed)}
            out.add(position, split=split, dt=1.0, source="", box=BOX, **given)
    return path


def settings(path: Path, *more: str) -> config.Config:
    return config.load(None, [*SETTINGS, f"data.path={path}", *more])


def make_store(file: Path, out: Path, made: config.Config) -> Store:
    inputs = store_writer.build_inputs(Trajectories(file), parts=2, method="metis", settings=made.data)
    store_writer.write_store(Trajectories(file), out, inputs, lambda *_: None)
    return Store(out)


def _step(group: comm.Comm, made: config.Config, path: str, own_steps: int) -> dict[str, Any]:
    """Predictions and gradients of a step on this rank's part, or in one process on all parts, in float64."""
    exchange, store = made.partition.halo == "exchange", Store(path)
    if group.size > 1:
        graph = store.read(3, group.rank, exchange)
    else:
        graph = store.whole(3, exchange) if exchange else halo.batch([store.read(3, part) for part in range(2)])
    for name, value in graph.ndata.items():
        graph.ndata[name] = value.double() if value.is_floating_point() else value
    model = trainer.build_model(made, (1, 1), group, store.statistics()).double()
    parallel_check.randomize_output_weights(model)
    graph = augmentation.augment(made, model, graph, group, own_steps, seed=5)
    predicted, _ = model(graph)
    loss, _ = trainer.compute_loss(made, model, graph, group, torch.Generator())
    loss.backward()
    group.sum_gradients(model.parameters())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    result = {"gid": graph.ndata["gid"], "x": predicted.detach(), **gradients}
    return {name: value.numpy() for name, value in result.items()}  # tensors would travel through files


CASES = [("FastEGNN", "exchange", 0, "", ""), ("FastEGNN", "exchange", 2, "body", "")]
CASES += [("SchNet", "exchange", 2, "body", ""), ("EGNN", "bridge", 2, "", "")]
CASES += [("EGNN", "exchange", 2, "", "knn"), ("FastEGNN", "exchange", 2, "body", "given")]


def edge_keys(edges: str) -> list[str]:
    return [f"data.{key}={value}" for key, value in EDGES.get(edges, {}).items()]


@pytest.mark.parametrize(("name", "mode", "own_steps", "fixed", "edges"), CASES)
def test_many_processes_equal_one(file, tmp_path, name, mode, own_steps, fixed, edges):
    keys = [f"model.name={name}", f"partition.halo={mode}", f"data.fixed={fixed}", *edge_keys(edges)]
    made = settings(file, *keys)
    store = make_store(file, tmp_path / "store", made)
    fields = store.disk.part("shard-00000", 0).nodes
    numbers = {key: fields[key].element_size() / 4 * fields[key][0].numel() for key in set(store.fields) - {"gid"}}
    assert node_floats(store.inputs) == sum(numbers.values())
    made.data.radius = store.rule.radius
    ranks = spawn.run_ranks(_step, 2, made, str(store.path), own_steps)
    results = [*ranks, _step(comm.SingleProcess(), made, str(store.path), own_steps)]
    *ranks, one = [{key: torch.from_numpy(value) for key, value in result.items()} for result in results]
    x = torch.cat([rank["x"] for rank in ranks])[torch.cat([rank["gid"] for rank in ranks]).argsort()]
    assert parallel_check.relative_difference(x, one["x"][one["gid"].argsort()]) < 1e-10
    least = 1e-3 * max(float(one[key].abs().max()) for key in one if key not in ("gid", "x"))
    for key in set(one) - {"gid", "x"}:
        assert parallel_check.relative_difference(ranks[0][key], one[key], least) < 1e-10, key


def test_store_and_file_agree(file, tmp_path):
    made = settings(file)
    store = make_store(file, tmp_path / "store", made)
    verify_store(store, lambda *_: None)
    samples = open_dataset(made, 0, 1)
    assert store.statistics() == pytest.approx(samples.statistics(), rel=1e-12)
    own, stored = samples[3], store.whole(3, exchange=True)
    for name in ("x", "v", "past", "y", "f", "a"):
        assert torch.equal(own.ndata[name], stored.ndata[name])
    for name in ("gravity", "points", "normals"):
        assert torch.equal(getattr(domain.get(own), name), getattr(domain.get(stored), name))
    data = Trajectories(file)
    frames = [data.position(0, t) for t in range(14)]
    squares = [
        (frames[t + 1] - 2 * frames[t] + frames[t - 1] - np.array(GRAVITY, np.float64)) ** 2 for t in range(4, 13)
    ]
    frames = [data.position(1, t) for t in range(14)]
    squares += [
        (frames[t + 1] - 2 * frames[t] + frames[t - 1] - np.array(GRAVITY, np.float64)) ** 2 for t in range(4, 13)
    ]
    expected = np.sqrt(np.concatenate([square.ravel() for square in squares]).mean())
    assert samples.statistics()[1] == pytest.approx(expected, rel=1e-3)  # differences of float32 positions


@pytest.mark.parametrize("mode", ["bridge", "exchange"])
@pytest.mark.parametrize("edges", ["", "knn", "given"])
def test_edges_of_the_same_state_are_the_same(file, tmp_path, mode, edges):
    """Rebuilt on threads as ranks, with the edges between parts in halo mode."""
    made = settings(file, *edge_keys(edges))
    store, exchange = make_store(file, tmp_path / "store", made), mode == "exchange"
    parts = [store.read(3, p, exchange) for p in range(2)]

    def rebuild(member: comm.Comm) -> torch.Tensor:
        part = parts[member.rank]
        nodes = part.ndata
        velocities = torch.stack([nodes["v"], *nodes["past"].split(3, 1)], 1)
        new = augmentation.rebuilt(made, part, member, (nodes["x"], velocities), nodes["y"])
        ends = []
        for graph in (part, new):
            src, dst = graph.edges()
            if exchange:
                own = halo.get(graph)
                rows = torch.cat(
                    [torch.stack([torch.full_like(r, k), r], 1) for k, r in enumerate(own.parts[0].recv_rows)]
                )
                key = rows[own.src] * torch.tensor([1000, 1]) + 10**6
                src, dst = torch.cat([src, key.sum(1)]), torch.cat([dst, own.dst])
            ends.append(sorted(zip(src.tolist(), dst.tolist(), strict=True)))
        return ends

    for before, after in run_ranks(2, rebuild):
        assert before == after
        assert before


def test_without_a_radius_lengths_are_in_units_of_the_mean_edge(file, tmp_path):
    made = settings(file, *edge_keys("given"))
    store, samples = make_store(file, tmp_path / "store", made), open_dataset(made, 0, 1)
    lengths = [samples[n].edata["e"][:, 0] for n in samples.splits["train"]]
    expected = float(np.mean([length.mean() for length in lengths]))
    assert samples.radius == pytest.approx(expected, rel=0.01)
    assert store.rule.radius == samples.radius
    stored = open_dataset(settings(store.path, *edge_keys("given")), 0, 2)
    assert stored.complete(made).data.radius == samples.radius
    assert config.differences(samples.complete(made), made) == []  # a resume and a sweep take it for the same
    assert settings(file, *edge_keys("given"), "data.radius=0.4").data.radius == 0.4
    with pytest.raises(Failure, match=r"data\.radius=0\.4 in the config, .*; set it"):
        open_dataset(settings(store.path, *edge_keys("given"), "data.radius=0.4"), 0, 2)


def test_noise_is_that_of_the_particle_and_leaves_the_displacement_of_the_target(file):
    made = settings(file)
    graph, model = open_dataset(made, 0, 1)[3], None
    noisy = augmentation.augment(made, model, graph, comm.SingleProcess(), 0, seed=1)
    for name in ("x", "v", "past"):
        assert not torch.equal(noisy.ndata[name], graph.ndata[name])
    assert torch.allclose(noisy.ndata["y"] - noisy.ndata["x"], graph.ndata["y"] - graph.ndata["x"], atol=1e-6)
    walk = noisy.ndata["v"] - graph.ndata["v"]
    earlier = noisy.ndata["past"][:, :3] - graph.ndata["past"][:, :3]
    assert torch.allclose(noisy.ndata["x"] - graph.ndata["x"], walk + earlier, atol=1e-6)
    assert float(walk.std()) == pytest.approx(0.01, rel=0.15)
    assert float(earlier.std()) == pytest.approx(0.01 / 2**0.5, rel=0.15)
    star = domain.advance(noisy.ndata["x"], noisy.ndata["v"], domain.get(graph).gravity[0])
    src, dst = graphs.radius_edges(star.numpy(), 0.27)
    assert {*zip(*(end.tolist() for end in noisy.edges()), strict=True)} == {
        *zip(src.tolist(), dst.tolist(), strict=True)
    }
    ids = np.array([7, 3, 10**9])
    assert np.array_equal(augmentation.normal_draws(1, ids, 4)[1], augmentation.normal_draws(1, ids[1:2], 4)[0])
    drawn = augmentation.normal_draws(1, np.arange(20_000), 2)
    assert np.abs(drawn.mean(0)).max() < 0.03
    assert np.abs(np.cov(drawn.T) - np.eye(2)).max() < 0.03


def test_own_steps_are_those_of_a_rollout(file):
    made = settings(file, "model.name=FastEGNN")
    samples, one = open_dataset(made, 0, 1), comm.SingleProcess()
    model = trainer.build_model(made, samples.widths, one, samples.statistics())
    start, graph = samples[1], samples[3]  # two frames later
    pushed = augmentation.augment(made, model, graph, one, 2, seed=0)
    with torch.no_grad():
        x_1 = model(start)[0]
        state = x_1, torch.stack([x_1 - start.ndata["x"], start.ndata["v"]], 1)
        x_2 = model(augmentation.rebuilt(made, start, one, state, x_1))[0]
    assert torch.allclose(pushed.ndata["x"], x_2, atol=1e-5)
    assert torch.allclose(pushed.ndata["v"], x_2 - x_1, atol=1e-5)
    assert torch.allclose(pushed.ndata["y"], graph.ndata["y"] + x_2 - graph.ndata["x"], atol=1e-5)


def test_bodies_move_as_prescribed_and_are_not_judged(file):
    data, made, one = Trajectories(file), settings(file, "data.fixed=body"), comm.SingleProcess()
    samples, body = open_dataset(made, 0, 1), data.attribute(0, "body") != 0
    graph, states = samples[3], []  # frame 7
    assert samples.frames[3] == (0, 7)
    assert torch.equal(graph.ndata["moving_id"] < 0, torch.from_numpy(body))
    assert not torch.equal(graph.ndata["y"][body], graph.ndata["x"][body])

    def model(given):
        states.append(given)
        return given.ndata["x"] + 0.1, None

    pushed = augmentation.augment(made, model, graph, one, 2, seed=0)
    for frame, state in zip((5, 6, 7), (*states, pushed), strict=True):
        before, x = data.position(0, frame - 1), data.position(0, frame)
        np.testing.assert_allclose(state.ndata["x"][body], x[body], atol=1e-6)
        np.testing.assert_allclose(state.ndata["v"][body], (x - before)[body], atol=1e-6)
        np.testing.assert_allclose(
            state.ndata["past"][body][:, :3], (before - data.position(0, frame - 2))[body], atol=1e-6
        )
    assert torch.equal(pushed.ndata["x"][body], graph.ndata["x"][body])
    wrong = graph.ndata["y"] + torch.from_numpy(body)[:, None]  # predictions of bodies do not count
    loss = [
        trainer.compute_loss(made, lambda _, y=y: (y, torch.zeros(1, 0, 3)), graph, one, torch.Generator())[1]
        for y in (graph.ndata["y"], wrong, graph.ndata["y"] + 1)
    ]
    assert [float(value) for value in loss] == [0, 0, pytest.approx(1)]
    free = settings(file)
    assert samples.statistics() != pytest.approx(open_dataset(free, 0, 1).statistics(), rel=1e-6)


@pytest.mark.parametrize(("keys", "learns"), [("features", True), ("node_attributes", True), ("", False)])
def test_materials_are_node_attributes(tmp_path, keys, learns):
    """Particles of material 1 fall, those of material 0 fly straight on."""
    with Writer(tmp_path / "data.h5", {}) as out:
        for seed, split in enumerate(("train", "valid", "test")):
            rng, t = np.random.default_rng(seed), np.arange(4)[:, None, None]
            material, g = rng.integers(0, 2, 60), np.array([0, -0.02, 0])
            x = rng.random((60, 3)) + 0.02 * rng.normal(size=(60, 3)) * t + material[:, None] * g * t**2 / 2
            out.add(x, split=split, dt=1.0, source="", attributes={"material": material}, gravity=g)
    given = [f"data.{key}=[{'material' * (key == keys)}]" for key in ("features", "node_attributes")]
    made = settings(tmp_path / "data.h5", *given, "data.walls=none", "data.history=1", "data.pushforward=0")
    samples, one = open_dataset(made, 0, 1), comm.SingleProcess()
    model = trainer.build_model(made, samples.widths, one, samples.statistics())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        loss, _ = trainer.compute_loss(made, model, samples[0], one, torch.Generator())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    valid = samples[samples.splits["valid"][0]]
    with torch.no_grad():  # in units of the target's mean square
        error = trainer.compute_loss(made, model, valid, one, torch.Generator())[0]
    assert error < 0.05 if learns else error > 0.3


def test_own_steps_rise_over_the_epochs():
    made = config.load(None, [*SETTINGS, "data.pushforward=3", "train.epochs=100", "train.pushforward_start=0.4"])
    drawn = {
        e: [augmentation.own_steps(made, e, torch.Generator().manual_seed(k)) for k in range(300)] for e in (39, 40, 99)
    }
    assert {epoch: max(steps) for epoch, steps in drawn.items()} == {39: 0, 40: 1, 99: 3}
    assert drawn[99].count(0) == pytest.approx(150, abs=40)


def _rollout_error(group: comm.Comm, made: config.Config) -> float:
    model = trainer.build_model(made, (1, 1), group, (0.05, 0.01, 1.0))
    parallel_check.randomize_output_weights(model)
    return selection.rollout_error(group, made, model.eval(), ["mass"])


def test_many_processes_select_as_one(file):
    keys = ["data.velocity_scale=1", "train.select_steps=5", f"train.select_data={file}", "partition.halo=exchange"]
    made = settings(file, *keys)
    one, (first, second) = _rollout_error(comm.SingleProcess(), made), spawn.run_ranks(_rollout_error, 2, made)
    assert first == second == pytest.approx(one, rel=1e-3)


def test_rollouts_choose_the_best_checkpoint(file, tmp_path, monkeypatch, capsys):
    from dist_egnn.commands.train import resumed_config, run_training

    errors = iter([3.0, 1.0, 2.0, 0.5])
    monkeypatch.setattr(selection, "rollout_error", lambda *_: next(errors))
    keys = ["train.select=rollout", "train.select_steps=4", f"run.dir={tmp_path / 'run'}"]
    run_training(settings(file, *keys, "train.epochs=3"))
    assert "best validation MSE of rollouts 1.0000e+00" in capsys.readouterr().out
    best = checkpoint.load(tmp_path / "run" / "best.pt")
    assert (best["epoch"], best["best"], config.parse(best["config"], "").train.select) == (2, 1.0, "rollout")
    run_training(resumed_config(tmp_path / "run", ["train.epochs=4"]), resume=True)
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["valid_rollout_mse"].tolist() == [3.0, 1.0, 2.0, 0.5]
    assert checkpoint.load(tmp_path / "run" / "best.pt")["epoch"] == 4


def test_selection_by_rollouts_needs_the_trajectories(file, small, tmp_path):
    made = settings(file, "train.select=rollout", "train.select_steps=4")
    store = make_store(file, tmp_path / "store", made)
    made.data.path = str(store.path)
    with pytest.raises(Failure, match=r"needs trajectories, and .*data\.h5 is no file; set train\.select_data"):
        selection.trajectories_file(made)
    (tmp_path / "data.h5").symlink_to(file)  # where the store names it
    assert selection.trajectories_file(made) == str(tmp_path / "data.h5")
    for key, value, message in (
        ("select_data", str(small), r"small\.h5: other validation data than .*store: positions"),
        ("select_steps", 12, r"train\.select_steps=12: trajectory 2 of .* ends 11 steps after frame 2; use at most 11"),
    ):
        with pytest.raises(Failure, match=message):
            selection.trajectories_file(replace(made, train=replace(made.train, **{key: value})))


@pytest.mark.parametrize(("parts", "mode", "repartition"), [(1, "exchange", 10), (2, "bridge", 1)])
def test_trains_and_rolls_out_from_the_command_line(file, tmp_path, parts, mode, repartition):
    from dist_egnn.commands.train import run_training

    run = tmp_path / "run"
    keys = ("train.epochs=3", "train.pushforward_start=0", "data.fixed=body", "train.select=rollout")
    keys += ("train.select_steps=4",)
    made = settings(file, *keys, f"partition.parts={parts}", f"partition.halo={mode}", f"run.dir={run}")
    run_training(made)
    chosen = pd.read_csv(run / "metrics.csv")["valid_rollout_mse"]
    assert checkpoint.load(run / "best.pt")["epoch"] == chosen.argmin() + 1
    table = rollout.run_rollout(run, trajectory=3, start=4, steps=6, out=tmp_path / "r.vtkhdf", data=file)
    assert len(table) == 7
    assert table["ballistic_mse"].notna().all()
    with Rollout(tmp_path / "r.vtkhdf") as frames:
        assert frames.meta["repartition"] == repartition
        for frame in frames:
            true = Trajectories(file).position(3, frame.frame)
            np.testing.assert_array_equal(frame.position[:20], true[:20])
            assert frame.step == 0 or (frame.position[20:] != true[20:]).any(1).all()
    with pytest.raises(Failure, match=r"--steps 10: .*'body'.*data\.h5, up to frame 13; use at most 9"):
        rollout.run_rollout(run, trajectory=3, start=4, steps=10, out=tmp_path / "s.vtkhdf", data=file)
    measured, _ = rollout_metrics.evaluate_rollouts(run, 6, data=file, start=4)
    names = ["frame", "mse", "static_mse", "linear_mse", "ballistic_mse", "kinetic_energy", "true_kinetic_energy"]
    pd.testing.assert_frame_equal(measured[names], table[names], rtol=1e-5)
    with pytest.raises(Failure, match=r"best\.pt: a simulator .*distegnn rollout"):
        dist_egnn.load(run)
    if parts == 1:  # the first step of a rollout is the model's prediction for the sample of that frame
        samples = open_dataset(made, 0, 1)
        number = samples.frames.index((3, 4))
        model = trainer.build_model(made, samples.widths, comm.SingleProcess(), samples.statistics())
        checkpoint.load_weights(model, checkpoint.load(run / "best.pt"), run / "best.pt")
        with torch.no_grad():
            error = (model(samples[number])[0] - samples[number].ndata["y"])[20:].square().mean()
        assert table["mse"][1] == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("made", ["file", "store"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.history=14"], r"data\.h5: trajectory 0 has 14 frames.*lower data\.history"),
        (["data.gravity=[0,-1,0]"], r"data\.gravity=.*data\.h5.*leave data\.gravity out"),
        (["data.fixed=wall"], r"data\.h5.*'wall'"),
        ([], r"data\.walls=box: .*has no box; set data\.walls=none"),
    ],
)
def test_wrong_data_is_refused(file, small, tmp_path, more, message, made):
    given = settings(small if "no box" in message else file, *more)
    with pytest.raises(Failure, match=message) as failure:
        open_dataset(given, 0, 1)[0] if made == "file" else make_store(Path(given.data.path), tmp_path / "store", given)
    assert "\n" not in str(failure.value)


def test_statistics_of_another_store_are_refused(file, tmp_path):
    """A checkpoint of a simulator, resumed on a store of other frames."""
    made, one = settings(file), comm.SingleProcess()
    stores = [
        make_store(file, tmp_path / name, settings(file, *more))
        for name, more in (("a", []), ("b", ["data.first_frame=8"]))
    ]
    a, b = (trainer.build_model(made, (1, 1), one, store.statistics()) for store in stores)
    path = tmp_path / "best.pt"
    checkpoint.save(path, checkpoint.weights_only(a, made))
    with pytest.raises(Failure, match=r"best\.pt: .*σ_a.*data\.path") as failure:
        checkpoint.load_weights(b, checkpoint.load(path), path)
    assert "\n" not in str(failure.value)
    stores[0].snapshots = stores[0].snapshots.drop(columns="farthest")
    with pytest.raises(Failure, match=r"snapshots\.csv: .*'farthest'.*distegnn partition"):
        stores[0].statistics()


@pytest.mark.parametrize("key", ["data.walls=box", "data.pushforward=1", "model.predicts=velocity", "train.noise=1"])
def test_keys_of_a_simulator_need_a_history(key):
    with pytest.raises(Failure, match=rf"{key.partition('=')[0]}.*data\.history"):
        config.load(None, [key])


def falling_onto_the_floor(seed: int) -> np.ndarray:
    """Particles (24, 30, 3) that fall apart from each other and stay on the floor y = 0."""
    rng = np.random.default_rng(seed)
    x, v = rng.uniform([0, 0.3, 0], [4, 1.2, 4], (30, 3)), rng.uniform(-0.01, 0.01, (30, 3))
    frames = []
    for _ in range(24):
        frames.append(x)
        v = v + np.array([0, -0.01, 0])
        landed = (x + v)[:, 1] < 0
        after = np.where(landed[:, None], (x + v) * [1, 0, 1], x + v)
        x, v = after, after - x
    return np.stack(frames)


def test_without_walls_particles_leave_the_box(tmp_path):
    path, depth = tmp_path / "fall.h5", {}
    with Writer(path, {}) as out:
        for seed, split in enumerate(("train", "train", "valid", "test")):
            about = {"box": np.array([[-5, 0, -5], [9, 9, 9.0]]), "gravity": [0, -0.01, 0]}
            out.add(falling_onto_the_floor(seed), split=split, dt=1.0, source="", **about)
    keys = ["data.radius=0.3", "data.horizon=1", "data.history=1", "data.features=[]", "model.predicts=acceleration"]
    keys += ["model.name=EGNN", "model.hidden=16", "model.layers=1", "train.epochs=6", "train.lr=1e-2", "loss.mmd=0"]
    for walls in ("box", "none"):
        made = config.load(None, [*keys, f"data.path={path}", f"data.walls={walls}", f"run.dir={tmp_path / walls}"])
        trainer.train(comm.SingleProcess(), made)
        table = rollout.run_rollout(tmp_path / walls, trajectory=3, start=2, steps=20, out=tmp_path / f"{walls}.vtkhdf")
        assert isinstance(table, pd.DataFrame)
        with Rollout(tmp_path / f"{walls}.vtkhdf") as frames:
            depth[walls] = float(-np.minimum(frames[20].position[:, 1], 0).mean())
    assert depth["box"] < 0.02
    assert depth["none"] > 0.1
