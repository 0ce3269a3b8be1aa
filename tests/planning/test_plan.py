"""`distegnn plan`: its counts are those of the store and the run, its memory is that of the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_comm
import bench_data
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dist_egnn import cli
from dist_egnn.commands.partition import run_partition
from dist_egnn.commands.plan import run_plan
from dist_egnn.commands.train import run_training
from dist_egnn.config import Config, load, to_yaml
from dist_egnn.data import dataset
from dist_egnn.data.store import Store
from dist_egnn.distributed import comm, spawn
from dist_egnn.distributed.call_counter import PHASES, Call, SimulatedRank
from dist_egnn.errors import Failure
from dist_egnn.ops import tiling
from dist_egnn.planning import plan, trial, trial_data
from dist_egnn.planning.trial import Times, Trial
from dist_egnn.train import metrics, preflight, trainer
from dist_egnn.utils import memory, part_weights, resources

DATA = ["data.radius=0.27", "data.horizon=3", "data.frames=3", "data.features=[mass,viscosity/max,speed]"]
DATA += ["data.node_attributes=[mass]", "model.hidden=8", "model.layers=2"]


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MIN_SECONDS", 0.0)


def config_of(path: Path, *more: str) -> Config:
    return load(None, [*DATA, f"data.path={path}", *more])


def open_source(path: Path, folder: Path, *more: str, parts: int = 1) -> trial_data.Source:
    return trial_data.open_source(config_of(path, *more), parts, folder, print)


def test_counts_are_the_stores(make_store: Any, small: Path, tmp_path: Path) -> None:
    """From the tables of a store, and from a file of which some snapshots are partitioned."""
    stored = open_source(make_store(3), tmp_path, parts=3)
    cut = open_source(small, tmp_path, "partition.parts=3", parts=3)
    for source in (stored, cut):
        assert {name: c.shape for name, c in source.counts.items()} == {"train": (6, 3, 2), "valid": (3, 3, 2)}
    # the largest trajectory comes first in the trial; frames are those of the run
    assert np.array_equal(cut.tried[:, :, 0].sum(1), stored.tried[[3, 4, 5, 0, 1, 2]][:, :, 0].sum(1))
    assert cut.tried[:, :, 1].sum() == pytest.approx(stored.tried[:, :, 1].sum(), rel=0.05)
    assert (stored.table[..., 2] > 0).all()
    for name, counts in cut.counts.items():
        assert np.array_equal(counts[:, :, 0].sum(1).round(), stored.counts[name][:, :, 0].sum(1))
    # the graph that the model of a rank gets
    graph = dataset.open_dataset(config_of(make_store(3)), 1, 3)[stored.snapshots[2]]
    assert [graph.num_nodes(), graph.num_edges()] == stored.tried[2, 1].tolist()
    # one process, and complete graphs
    assert open_source(small, tmp_path).counts["train"][:, 0, 0].tolist() == [200] * 3 + [250] * 3
    counts = open_source(small, tmp_path, "data.radius=.inf").counts["train"]
    assert counts[:, 0, 1].tolist() == pytest.approx([200 * 199] * 3 + [250 * 249] * 3, rel=0.01)


def collectives(group: Any, config: Config, snapshots: list[int]) -> list[list[tuple[str, int]]]:
    """Phase and bytes of torch's collectives in a real group, a step for each snapshot."""
    steps = [bench_comm.count_calls(group, config, snapshot) for snapshot in snapshots]
    return [[(call.phase, call.payload) for calls in step.values() for call in calls] for step in steps]


@pytest.mark.parametrize(("parts", "mode"), [(2, "bridge"), (2, "exchange"), (3, "exchange")])
def test_sums_and_exchanges_are_those_of_a_run(make_store: Any, parts: int, mode: str) -> None:
    """Each call of each rank on each snapshot, and their means in the plan."""
    config = config_of(make_store(parts, "bisection"), f"partition.halo={mode}", "train.accumulate=2")
    snapshots = [5, 0, 3]
    real = spawn.run_ranks(collectives, parts, config, snapshots)
    inputs = trial.halo_inputs(Store(config.data.path), snapshots) if mode == "exchange" else [{}] * parts
    for rank, steps in enumerate(real):
        batches = [[n] for n in snapshots]
        calls = trial.try_rank(comm.SingleProcess(), config, rank, parts, batches, inputs[rank], 0).calls
        assert [[(c.phase, c.sent(parts)) for c in step] for step in calls] == steps
        count, payload, wire = plan.step_communication(calls, 2, parts)
        sizes = [size for step in steps for phase, size in step for _ in range(1 if phase == "gradients" else 2)]
        assert (3 * count, 3 * wire) == (len(sizes), pytest.approx(sum(sizes)))
        assert payload == wire if parts == 2 else payload < wire
    assert len(steps[0]) == (4 if mode == "exchange" else 2) * config.model.layers + 1
    group, x = SimulatedRank(0, 1), torch.ones(3, requires_grad=True)
    group.sum(x).sum().backward()
    assert (group.counter.calls, x.grad.tolist()) == ([], [1, 1, 1])  # type: ignore[union-attr]


def source_of(numbers: int) -> trial_data.Source:
    """Two ranks; every snapshot of the run has twice the nodes and edges of those tried."""
    tried = np.tile([[100.0, 1000.0], [100.0, 1400.0]], (numbers, 1, 1))
    counts = {"train": np.tile(2 * tried[:1], (10, 1, 1)), "valid": np.tile(2 * tried[:1], (3, 1, 1))}
    return trial_data.Source(Config(), list(range(numbers)), tried, counts, np.zeros((numbers, 2, 4)))


def test_time_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [Times(batch=1.0, forward=0.4, finish=0.1, fresh=0.2, ready=0.0), Times(2.0, 0.6, 0.1, 0.2, 0.0)]
    sums = {"forward": 0.01, "backward": 0.02, "gradients": 0.05}
    config = load(None, ["train.batch_size=2", "train.accumulate=2"])
    monkeypatch.setattr(resources, "available_cores", lambda: 2.0)
    estimate = plan.TimeEstimate(config, source_of(2), times, sums)
    assert (estimate.batches, estimate.steps) == ({"train": 5, "valid": 2}, 3)
    assert estimate.batch("train", fresh=False) == pytest.approx(2 * 2.0 + 0.03)  # the slower rank, twice the size
    assert estimate.step(fresh=False) == pytest.approx(4.03 * 5 / 3 + 0.1 + 0.05)
    assert estimate.epoch(fresh=False) == pytest.approx(5 * 4.03 + 3 * 0.15 + 2 * (1.2 + 0.01))
    assert estimate.alone(1) == pytest.approx(4.0 * 5 / 3 + 0.1)
    monkeypatch.setattr(resources, "available_cores", lambda: 1.0)  # both ranks and their readers in turn
    estimate = plan.TimeEstimate(config, source_of(2), times, sums)
    assert estimate.batch("train", fresh=True) == pytest.approx(2 * (1.0 + 2.0) + 2 * (0.2 + 0.2) + 0.03)


def test_a_store_for_two_machines(monkeypatch: pytest.MonkeyPatch, make_store) -> None:
    """Each machine has the cores for its own ranks only; four ranks on one machine take turns."""
    monkeypatch.setattr(resources, "available_cores", lambda: 2.0)
    times = [Times(batch, 0.4, 0.1, 0.0, 0.0) for batch in (1.0, 2.0, 1.0, 1.0)]
    source = source_of(2)
    source.tried = np.tile(source.tried, (1, 2, 1))
    source.counts = {split: np.tile(counts, (1, 2, 1)) for split, counts in source.counts.items()}
    call_s = dict.fromkeys(("forward", "backward", "gradients"), 0.0)
    for machines, seconds in ((1, 2 * 5.0 / 2), (2, 2 * 2.0)):
        estimate = plan.TimeEstimate(Config(), replace(source, machines=machines), times, call_s)
        assert estimate.batch("train", fresh=False) == pytest.approx(seconds)
    assert plan.largest_sum([3.0, 1.0, 2.0, 5.0], 2) == 7.0
    for store, machines in ((make_store(2, trainers=2, shard_nodes=0), 2), (make_store(2), 1)):
        config = load(None, [*DATA, f"data.path={store}"])
        assert trial_data.open_source(config, Store(store).parts, Path("unused"), print).machines == machines


def test_work_between_calls_by_hand() -> None:
    """That of the slowest rank, at most 10 ms."""
    calls = [[Call("forward", 1, 4)] * count for count in (8, 10)]
    for slowest, expected in ((0.04, 0.004), (4.0, 0.01)):
        times = [Times(batch, 0.0, 0.0, 0.0, 0.0) for batch in (0.02, slowest)]
        assert plan.work_between_calls([Trial(t, t, 1.0, 0.0, 1.0, calls, 0.0) for t in times]) == expected


def test_cached_samples_count_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    source, times = source_of(3), Times(1.0, 1.0, 0.0, 0.0, 0.0)
    trials = [Trial(times, times, 1.0, 5e8, ratio, [], 1.0) for ratio in (1.0, 1.5)]
    one = [dataset.cached_bytes(100, 1000), dataset.cached_bytes(100, 1400)]
    result = plan.peak_bytes(source, trials, 1e7)
    assert result == pytest.approx([5e8 + 1e7 + 1.0 * (26 - 3) * one[0], 5e8 + 1e7 + 1.5 * (26 - 3) * one[1]])
    monkeypatch.setattr(dataset, "CACHE_BYTES", 2 * 10 * one[0])
    assert plan.peak_bytes(source, trials, 0.0)[0] == pytest.approx(5e8 + 7 * one[0])


def test_graph_bytes_by_hand(make_store: Any) -> None:
    graph = dataset.open_dataset(config_of(make_store(2)), 0, 2)[0]
    n, e = graph.num_nodes(), graph.num_edges()
    width = 3 + 3 + 3 + 1 + 3  # x, v, f, a, y in float32; gid, total and the centroid's three in 64 bits; e twice
    assert graph.formats()["created"] == ["coo"]
    assert trial.graph_bytes(graph) == n * (4 * width + 8 * 5) + e * 8 + 4 * 2 * e


@pytest.mark.parametrize(("larger", "count"), [(1, 10), (60, 4), (1000, 3)])
def test_picked_batches_hold_the_largest(larger: int, count: int) -> None:
    """Many of small graphs, few of large ones: a batch of two has 3,960 rows on average."""
    source = source_of(20)
    source.tried[13] *= 3
    source.tried *= larger
    batches = plan.pick_batches(source, 2)
    assert [len(batch) for batch in batches] == [2] * count
    assert batches[0][0] == 13
    assert len(set(np.ravel(batches))) == 2 * count
    assert plan.pick_batches(source_of(1), 4) == [[0]]


def test_plan_of_a_store_on_the_command_line(make_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "my.yaml"
    config.write_text(to_yaml(config_of(make_store(2), "train.accumulate=4")))
    ran = CliRunner().invoke(cli.app, ["plan", str(config), "train.epochs=3", "--json", "--measure"])
    assert ran.exit_code == 0, ran.exception
    result = json.loads([line for line in ran.output.splitlines() if line.startswith("{")][-1])
    assert "6 train, 3 valid snapshots, 2 processes on" in ran.output
    assert [result[key] for key in ("parts", "steps", "epochs", "partition_s")] == [2, 2, 3, 0]
    assert result["calls"] == 4 * (2 + 2) + 1  # batches of a step, layers forward and backward; the gradients
    numbers = 3 + 3 * 3 + 8 * 3
    model = trainer.build_model(load(config), (3, 1), SimulatedRank(0, 2))
    assert result["payload_bytes"] == 4 * (16 * numbers + sum(p.numel() for p in model.parameters()) + 3)
    assert result["wire_bytes"] == result["payload_bytes"]  # 2(P − 1)/P
    assert [rank["rank"] for rank in result["ranks"]] == [0, 1]
    for rank in result["ranks"]:
        assert 0.1 < rank["peak_gb"] < 1
        assert min(rank["cpu_s"], rank["cut"], rank["halo"]) > 0
        assert rank["sent_bytes"] == result["wire_bytes"]
        assert f"{rank['speed']:,.0f}" in ran.output
    weights = result["weights"]
    assert ("alike" if weights is None else f"partition.weights={part_weights.to_text(weights)}") in ran.output
    assert min(result["step_s"], result["epoch_s"]) > 0
    assert result["exchange_s"] >= 0
    assert sorted(f.name for f in tmp_path.iterdir()) == ["my.yaml"]


def test_plan_in_halo_mode(make_store: Any, capsys: Any) -> None:
    """Ranks send different amounts and compute on edges between parts; samples count as their largest part."""
    config = config_of(make_store(3, "bisection"), "partition.halo=exchange", "train.epochs=1")
    run_plan(config, as_json=True)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    store = Store(config.data.path)
    train_rows = store.parts_table[store.parts_table["snapshot"].isin(store.split("train"))]
    means = train_rows.groupby("part")[["nodes", "edges"]].mean().to_numpy()  # edges: all
    assert [[rank["nodes"], rank["edges"]] for rank in result["ranks"]] == pytest.approx(means)
    sent = [rank["sent_bytes"] for rank in result["ranks"]]
    assert max(sent) == result["wire_bytes"] > min(sent)
    assert result["calls"] == 2 * 2 * 2 + 1
    counts = np.array([[[100, 1000], [300, 900]], [[200, 500], [100, 600]]])  # (S, P, 2)
    held = dataset.cached_bytes(300, 1000) + dataset.cached_bytes(200, 600)
    assert plan.cached_bytes(counts, config).tolist() == [held, held]


def test_weights_by_hand(small: Path) -> None:
    """Rank 0 processes 2 · 1600 rows in 1 s of its processor, rank 1 2 · 2000 in 2 s."""
    times = Times(5.0, 1.0, 1.0, 1.0, 1.0)  # not used for weights
    source = source_of(2)
    source.tried[:, :, 0] *= 6 / tiling.EDGES_PER_NODE  # edges + tiling.EDGES_PER_NODE · nodes: 1,600 and 2,000

    def plan_of(*fastest: float) -> plan.Plan:
        trials = [Trial(times, times, 1.0, 5e8, 1.0, [[]], seconds) for seconds in fastest]
        config = load(None, ["train.batch_size=2"])
        return plan.combine(config, source, trials, dict.fromkeys(PHASES, 0.0), [1.0, 1.0])

    unequal = plan_of(1.0, 2.0)
    assert [rank.speed for rank in unequal.ranks] == pytest.approx([3200, 2000])
    assert unequal.weights == [1.6, 1]
    assert plan_of(1.0, 1.3).weights is None  # 3200 and 3077 rows a second
    with pytest.raises(Failure, match=r"--measure: .* partition\.parts=2"):  # one process needs none
        run_plan(config_of(small), measure=True)


def test_a_model_too_large_fails_before_the_trial(make_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_store(2)
    monkeypatch.setattr(memory, "available_memory", lambda *_: 1e8)
    monkeypatch.setattr(spawn, "run_ranks", lambda *_, **__: pytest.fail("a trial has started"))
    with pytest.raises(Failure, match=r"one of 2 processes .*; raise partition\.parts"):
        plan.make_plan(config_of(path))
    deep = config_of(path, "model.layers=100", "model.hidden=4096")
    monkeypatch.setattr(memory, "available_memory", lambda *_: 1.5e9)
    with pytest.raises(Failure, match=r"or set train\.kept"):
        preflight.check_training(deep, 2)
    deep.train.kept = "/tmp"
    preflight.check_training(deep, 2)


@pytest.mark.parametrize("stored", [True, False])
def test_training_is_refused_before_there_is_a_folder(make_store, small, tmp_path, monkeypatch, stored) -> None:
    """Too little memory, a missing folder, more parts than nodes, weights that cannot be met."""
    path, parts = (make_store(2), []) if stored else (small, ["partition.parts=2"])
    given = [f"run.dir={tmp_path / 'run'}", *parts]
    for more, match in (
        (["train.kept=/nowhere"], "train.kept=/nowhere: no such folder"),
        (["partition.parts=201"], "for 2;" if stored else "200 nodes, fewer than 201 parts"),
        (["partition.parts=2", "partition.weights=[1,999]"], "made with null" if stored else r"0\.2 of 200 nodes"),
    ):
        with pytest.raises(Failure, match=match):
            run_training(config_of(path, *given, *more))
    monkeypatch.setattr(memory, "available_memory", lambda *_: 0.3e9)
    with pytest.raises(Failure, match=r"one of 2 processes .* 0\.4 GB, 0\.3 GB"):
        run_training(config_of(path, *given))
    assert not list(tmp_path.iterdir())


def peak_gb(group: Any, config: Any) -> float:
    torch.set_num_threads(1)
    trainer.train(group, config)
    return metrics.peak_memory_gb(torch.device("cpu"))


@pytest.mark.parametrize(("nodes", "parts", "halo"), [(500, 1, "bridge"), (2000, 2, "exchange")])
def test_planned_memory_is_that_of_the_run(tmp_path: Path, nodes: int, parts: int, halo: str) -> None:
    keys = ["model.hidden=32", "model.layers=2", "train.epochs=2", f"partition.halo={halo}"]
    radius = bench_data.write_data(tmp_path / "block.h5", nodes, 5, 14.6)
    config = bench_data.config_for(tmp_path / "block.h5", radius, parts, keys)
    planned = plan.make_plan(config)
    config.run.dir = str(tmp_path / "run")
    if parts > 1:
        run_partition(config, tmp_path / "store")
    real = spawn.run_ranks(peak_gb, parts, config, start_method="spawn" if parts == 1 else "")
    assert max(rank.peak_gb for rank in planned.ranks) == pytest.approx(max(real), rel=0.15)
