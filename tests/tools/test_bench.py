"""`python tools/bench`: it runs, reports what it measured, rejects invalid options; the plain peer equals our model."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_batch
import bench_cli
import bench_data
import bench_models
import bench_step
import bench_worker
import dgl
import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from dist_egnn.data import graphs
from dist_egnn.errors import Failure
from dist_egnn.models import network
from dist_egnn.ops import tiling
from dist_egnn.utils import memory, progress

plain = bench_step.load_peer("plain")
ROOT = Path(__file__).parents[2]


def bench_here(*arguments: object) -> dict[str, Any]:
    """A benchmark in this process; returns the JSON on its last line."""
    result = CliRunner().invoke(bench_cli.app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.exception
    return json.loads(result.output.splitlines()[-1])


def measure_here(timed: dict[str, bench_step.Options], folder: Path) -> dict[str, dict[str, Any]]:
    """In place of bench_step.measure_in_process."""
    threads = torch.get_num_threads()
    try:
        return bench_worker.measure_variants(folder, timed)
    finally:
        torch.set_num_threads(threads)


def block(nodes: int, degree: float, dtype: torch.dtype = torch.float64) -> dgl.DGLGraph:
    x = bench_data.block(nodes)
    graph = graphs.build_graph(*graphs.radius_edges(x, bench_data.radius_for(x, degree)), bench_data.node_fields(x))
    for data in (graph.ndata, graph.edata):
        data.update({name: value.to(dtype) for name, value in data.items() if value.is_floating_point()})
    return graph


@pytest.mark.parametrize(("nodes", "degree"), [(2, 1), (9, 8), (400, 14.6), (3000, 3), (2000, 40)])
def test_the_block_has_the_requested_degree(nodes: int, degree: float) -> None:
    x = bench_data.block(nodes)
    assert x.shape == (nodes, 3)
    assert np.array_equal(x, bench_data.block(nodes))
    src, _ = graphs.radius_edges(x, bench_data.radius_for(x, degree))
    assert len(src) / 2 == round(nodes * degree / 2)


def prediction_and_gradients(
    model: nn.Module, predict: Any, y: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    predicted = predict()
    ((predicted - y) ** 2).mean().backward()
    gradients = {name.replace(".virtual.", "."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return predicted.detach(), gradients


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("tile", [10**9, 500])
def test_plain_equals_ours(count: int, tile: int) -> None:
    graph = block(300, 12)
    torch.manual_seed(1)
    ours = network.EGNN(3, 2, 2, hidden=16, layers=3, virtual_nodes=count, tile=tile).double()
    for name, parameter in ours.named_parameters():
        if name.endswith(("phi_x.2.weight", "phi_xv.2.weight", "phi_z.2.weight")):
            parameter.data.normal_(0, 0.3)  # they start near zero; at full size an error is visible
    peer, predict = plain.peer(ours, graph, torch.device("cpu"))
    x, gradients = prediction_and_gradients(ours, lambda: ours(graph)[0], graph.ndata["y"])
    plain_x, plain_gradients = prediction_and_gradients(peer, predict, graph.ndata["y"])
    assert float((x - graph.ndata["x"]).abs().max()) > 1e-3
    torch.testing.assert_close(plain_x, x, rtol=1e-12, atol=1e-12)
    # φ_h, φ_z and φ_s of the last layer do not affect the prediction: their gradients may be missing or zero
    names = set(gradients) | set(plain_gradients)
    assert len(names) > 30
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name in names:
        shape = dict(peer.named_parameters())[name]
        a, b = (g.get(name, torch.zeros_like(shape)) for g in (plain_gradients, gradients))
        assert float((a - b).abs().max()) <= 1e-12 * largest, name


def test_step_reports_options_times_and_memory(tmp_path: Path, distegnn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours in a new process, in a folder with a file named dgl.py; then with the peers, all in this process."""
    (tmp_path / "dgl.py").write_text("raise SystemExit('a file of the user, not DGL')\n")
    words = ["step", "--nodes", "400", "--repeats", "1"]
    command = [distegnn.with_name("python"), str(ROOT / "tools" / "bench"), *words, "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    alone = json.loads(done.stdout.splitlines()[-1])
    assert alone["peers"] == {}
    assert alone["peak_gb"] < 2
    monkeypatch.setattr(bench_step, "measure_in_process", measure_here)
    step = bench_here(*words, "--peers")
    expected = {"nodes": 400, "edges": 5840, "degree": 14.6, "hidden": 64, "layers": 4, "virtual_nodes": 3}
    expected |= {"engine": "auto", "device": "cpu", "precision": "float32", "threads": 1, "repeats": 1}
    expected |= {"kept": "", "place": ""}
    assert {key: step[key] for key in expected} == {key: alone[key] for key in expected} == expected
    assert set(step["peers"]) - {"2-threads"} == {"bf16-messages", "torch", "untiled", "EGNNConv", "plain"}
    for row in (alone, step, *step["peers"].values()):
        assert 0 < row["forward_s"] < math.inf
        assert 0 < row["step_s"] < math.inf
        assert 0.05 < row["forward_peak_gb"] <= row["peak_gb"]
        assert row["once"] == []
        assert len(row["forward_all_s"]) == len(row["step_all_s"]) == 1
    assert min(step["tiles_s"], step["machine_gflops"]) > 0
    operations = bench_step.matmul_operations(bench_step.Options(nodes=400), step["edges"])
    assert step["gflops_forward"] == pytest.approx(operations / 1e9 / step["forward_s"])
    for name, row in step["peers"].items():
        for key in ("forward", "step", "peak"):
            unit = "gb" if key == "peak" else "s"
            assert row[f"{key}_ratio"] == pytest.approx(row[f"{key}_{unit}"] / step[f"{key}_{unit}"])
        if name != "EGNNConv":  # another model
            assert 0 <= row["difference"] < (1e-1 if name == "bf16-messages" else 1e-4)
    assert step["peers"]["bf16-messages"]["difference"] > 0
    assert "difference" not in step["peers"]["EGNNConv"]


def test_matmul_operations_are_those_of_the_modules() -> None:
    """Counted by torch on the plain peer; the other products are per graph, not per node or edge."""
    from torch.utils.flop_counter import FlopCounterMode

    options = bench_step.Options(nodes=300, hidden=32, layers=2, degree=10)
    graph = block(options.nodes, options.degree, torch.float32)
    _, predict = plain.peer(network.EGNN(3, 2, 2, hidden=32, layers=2, virtual_nodes=3), graph, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predict()
    n, e, h, c = options.nodes, graph.num_edges(), options.hidden, options.virtual_nodes
    # operations of the plain form on edges and for each virtual node that our model does on nodes or once per graph
    additional = 2 * options.layers * (2 * e * h * h - 2 * n * h * h + n * c * (2 * h * h + c * h) - n * h * h)
    per_graph = 2 * options.layers * c * (2 * h * h + h * h) + 2 * options.layers * 3 * c * c
    assert counter.get_total_flops() - additional - per_graph == bench_step.matmul_operations(options, e)


def test_batch_compares_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case has several tiles."""
    monkeypatch.setattr(bench_step, "measure_in_process", measure_here)
    monkeypatch.setattr(bench_batch, "SINGLE_NODES", (2500,))
    monkeypatch.setattr(bench_batch, "PROTEIN", (2, 150))
    monkeypatch.setattr(bench_batch, "MAX_REPEATS", 3)
    result = bench_here("batch", "--graphs", 4, "--nodes", 9, "--hidden", 8, "--layers", 2, "--repeats", 1)
    expected = {"hidden": 8, "layers": 2, "virtual_nodes": 3, "threads": 1, "engine": "auto", "notes": []}
    assert {key: result[key] for key in expected} == expected
    sizes = [[row[key] for key in ("case", "graphs", "nodes", "repeats")] for row in result["rows"]]
    assert sizes == [["nbody", 4, 36, 3], ["protein (synthetic)", 2, 300, 3], ["block 2500", 1, 2500, 3]]
    assert [result["rows"][k]["edges"] for k in (0, 2)] == [4 * 9 * 8, 36500]
    for row in result["rows"]:
        assert (row["tiled"]["tile"], row["untiled"]["tile"]) == (8192, 10**9)
        for key in ("forward", "step"):
            for kind in ("tiled", "untiled", "torch"):
                seconds = row[kind][f"{key}_all_s"]
                assert len(seconds) == row["repeats"]
                assert row[kind][f"{key}_s"] == sorted(seconds)[1] > 0
            for kind, prefix in (("untiled", ""), ("torch", "torch_")):
                turns = zip(*(row[which][f"{key}_all_s"] for which in (kind, "tiled")), strict=True)
                assert row[f"{prefix}{key}_ratio"] == sorted(other / tiled for other, tiled in turns)[1]
        assert 0 <= row["difference"] < 1e-4


def test_batch_halves_what_does_not_fit_untiled(monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench_step.Options(hidden=8, layers=2)
    nbody = bench_batch.cases(40, 50)[0]
    needed = bench_step.memory_needed("untiled", replace(options, nodes=10 * 50, degree=49, tile=10**9))
    monkeypatch.setattr(memory, "available_memory", lambda _: needed)
    case, note = bench_batch.reduce_to_memory(nbody, options)
    assert case.graphs == 10
    assert note.startswith("nbody: 10 of 40 graphs: ")
    monkeypatch.setattr(memory, "available_memory", lambda _: 1e6)
    with pytest.raises(Failure, match=r"'nbody', untiled, .* lower --nodes"):
        bench_batch.reduce_to_memory(nbody, options)


def test_a_written_batch_is_its_graphs(tmp_path: Path) -> None:
    """Each graph has its own radius, nodes and centroid, and no edge joins two graphs."""
    inputs = [(bench_data.block(9, seed=1), math.inf), (bench_data.chain(40), 10.0), (bench_data.block(1), 1.0)]
    edges = bench_step.write_graphs(inputs, tmp_path)
    batch = bench_worker._graph(tmp_path)
    assert batch.num_edges() == edges
    assert batch.batch_num_nodes().tolist() == [9, 40, 1]
    for graph, (x, radius) in zip(dgl.unbatch(batch), inputs, strict=True):
        src, dst = graphs.radius_edges(x, radius)
        assert torch.equal(torch.stack(graph.edges()), torch.from_numpy(np.stack([src, dst])))
        assert np.array_equal(graph.ndata["x"].numpy(), x)
        assert graph.ndata["total"].tolist() == [len(x)] * len(x)
        assert np.allclose(graph.ndata["centroid"].numpy(), x.mean(0), atol=1e-5)


def test_repetitions_alternate() -> None:
    order: list[str] = []
    seconds = bench_worker._times({name: lambda name=name: order.append(name) for name in "ab"}, 3, "cpu")
    assert "".join(order) == "abbaabba"
    assert [len(each) for each in seconds.values()] == [3, 3]
    waited = {
        clock: bench_worker._times({"": lambda: time.sleep(0.1)}, 1, "cpu", clock=clock)[""][0]
        for clock in bench_step.CLOCKS
    }
    assert waited["wall"] >= 0.1 > waited["processor"]


def test_a_long_pass_is_measured_once(tmp_path, monkeypatch, capsys):
    """One pass of each kind with progress events: a tile's update counts 1 forward and 3 backward."""
    monkeypatch.setattr(bench_worker, "LONG_S", 0.0)
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 0)
    monkeypatch.setattr(progress, "EVENT_INTERVAL_S", 0.0)
    monkeypatch.setenv(progress.EVENTS_VARIABLE, "1")
    x = bench_data.block(400)
    bench_step.write_graphs([(x, bench_data.radius_for(x, 10))], tmp_path)
    options = bench_step.Options(hidden=8, layers=2, tile=256, repeats=3)
    row = bench_worker.measure_variants(tmp_path, {"ours": options})["ours"]
    assert row["once"] == ["forward", "step"]
    assert len(row["forward_all_s"]) == len(row["step_all_s"]) == 1
    assert "equivariance_error" not in row
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    events = [json.loads(line.removeprefix(progress.EVENT_PREFIX)) for line in lines]
    passes = 2 * 7  # layers, tiles of 64 nodes
    for title, total, rest in (("forward", passes, []), ("step", 4 * passes, range(passes + 3, 4 * passes + 1, 3))):
        done = [line["done"] for line in events if (line["title"], line["total"]) == (f"ours, {title}", total)]
        assert done == [*range(1, passes + 1), *rest]


def test_layer_inputs_go_to_files_if_memory_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench_step.Options(nodes=10**7)
    in_memory, in_files = (bench_step.memory_needed("ours", replace(options, kept=kept)) for kept in ("", "/x"))
    assert in_files < 0.6 * in_memory
    for free, kept in ((in_memory, ""), ((in_memory + in_files) / 2, bench_step.OFFLOAD_FOLDER), (in_files / 2, "")):
        monkeypatch.setattr(memory, "available_memory", lambda _, free=free: free)
        chosen, note = bench_step.choose_offload_folder(options)
        assert chosen.kept == kept
        assert (f"files in {kept}, 21.4 GB" in note) == bool(kept)
        assert bench_step.choose_offload_folder(replace(options, kept="/y")) == (replace(options, kept="/y"), "")


def test_the_degree_of_many_nodes_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    x = bench_data.block(3000)
    exact = bench_data.radius_for(x, 14.6)
    monkeypatch.setattr(bench_data, "MAX_COUNTED", 2999)
    assert 0 < abs(bench_data.radius_for(x, 14.6) - exact) < 2e-3 * exact


def test_the_chain_is_compact() -> None:
    x = bench_data.chain(855)
    assert np.allclose(np.linalg.norm(np.diff(x, axis=0), axis=1), 3.8, atol=1e-4)
    assert np.linalg.norm(x, axis=1).max() <= 22.001
    degree = len(graphs.radius_edges(x, 10.0)[0]) / len(x)
    assert 70 < degree < 130


def test_models_are_measured_and_one_failure_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(timed: dict[str, bench_step.Options], folder: Path) -> dict[str, dict[str, Any]]:
        if "EGNN" in timed:
            raise Failure("pip install what it needs")
        return measure_here(timed, folder)

    monkeypatch.setattr(bench_step, "measure_in_process", failing)
    sizes = ("--nodes", 40, "--degree", 5, "--graphs", 1, "--hidden", 8, "--layers", 2, "--repeats", 1)
    result = bench_here("models", *sizes, "--model", "FastSchNet", "--model", "EGNN")
    assert result["notes"] == ["EGNN left out: pip install what it needs"]
    assert [(case["nodes"], case["edges"]) for case in result["cases"]] == [(100, 9900), (40, 200)]
    for case in result["cases"]:
        ((name, row),) = case["models"].items()
        assert name == "FastSchNet"
        assert row["forward_s"] > 0
        assert row["step_s"] > 0
        assert 0.05 < row["peak_gb"] < 100
        assert 0 < row["equivariance_error_float64"] < 1e-12
        assert 1e-12 < row["equivariance_error"] < 1e-4
        model = network.FastSchNet(3, 2, 2, hidden=8, layers=2)
        assert row["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_model_that_moves_nothing_is_equivariant() -> None:
    assert bench_worker._equivariance_error(network.Linear().double(), block(20, 5)) < 1e-15


def test_models_fail_if_none_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise Failure("no")

    monkeypatch.setattr(bench_step, "measure_in_process", failing)
    with pytest.raises(Failure, match=r"EGNN left out: no; RF left out: no"):
        bench_models.measure_models(bench_step.Options(nodes=30, degree=5), 1, ["EGNN", "RF"])


def test_the_phases_of_a_rollout_are_its_steps() -> None:
    sizes = ("--hidden", 16, "--layers", 1, "--parts", 1, "--steps", 3)
    result = bench_here("rollout", "--nodes", 200, "--model", "FastEGNN", *sizes)
    assert (result["stopped"], result["nodes"], result["steps"]) == ("", 200, 3)
    for clock in ("cpu_s", "wall_s"):
        seconds = {phase: value[clock] for phase, value in result["phases"].items()}
        assert set(seconds) == {"search", "model", "exchange", "watch", "writing"}
        assert min(seconds.values()) >= 0
        assert sum(seconds.values()) - seconds["writing"] == pytest.approx(result[clock])
    assert 0 < result["share"] < 1


@pytest.mark.parametrize(("parts", "count"), [(2, 3), (3, 1)])
def test_comm_counts_the_formula(parts: int, count: int) -> None:
    sizes = ("--hidden", 16, "--layers", 3, "--virtual-nodes", count)
    result = bench_here("comm", "--nodes", 150, "--parts", parts, *sizes)
    numbers = (parts - 1) * (3 + 3 * count + 16 * count)
    assert result["formula"] == numbers
    assert result["alike"] is True
    for phase in ("forward", "backward"):
        assert result["phases"][phase]["floats"] == [numbers] * 3
        assert result["phases"][phase]["bytes"] == 3 * numbers * 4
    model = network.EGNN(3, 2, 2, hidden=16, layers=3, virtual_nodes=count)
    gradients = sum(p.numel() for p in model.parameters()) + 3  # and loss, MSE, stop
    assert sum(result["phases"]["gradients"]["floats"]) == (parts - 1) * gradients


def test_partition_shows_every_method() -> None:
    result = bench_here("partition", "--nodes", 300, "--nodes", 400, "--parts", 3)
    assert [size["nodes"] for size in result["sizes"]] == [300, 400]
    for size in result["sizes"]:
        assert list(size["methods"]) == ["metis", "random", "kmeans", "spectral", "bisection", "morton"]
        assert 0 < size["methods"]["metis"]["edge_cut"] < size["methods"]["random"]["edge_cut"]
        assert min(size["store_s"], size["methods"]["metis"]["seconds"]) > 0


def test_pipeline_times_steps_and_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = bench_here("pipeline", "--nodes", 200, "--hidden", 8, "--layers", 1, "--repeats", 2)
    assert result["ratio"] == pytest.approx(result["fresh_s"] / result["fixed_s"])
    for key in ("fixed_s", "fresh_s", "read_s", "graph_s", "tiles_s"):
        assert 0 < result[key] < math.inf
    assert list(tmp_path.iterdir()) == []


WRONG = {
    r"--engine fast: unknown; use auto, native, torch or dgl": ["step --engine fast", "batch --engine fast"],
    r"--device cuda: not available": ["step --device cuda", "pipeline --device cuda"],
    r"--device tpu: unknown; use cpu, cuda or cuda:N": ["step --device tpu"],
    r"--precision half: unknown; use float32 or bf16-messages": ["step --precision half"],
    r"--(tile|hidden|graphs|repeats|steps) 0: must be at least 1": [
        *("step --tile 0", "step --hidden 0", "batch --graphs 0", "batch --repeats 0"),
        *("models --graphs 0", "models --hidden 0", "pipeline --repeats 0", "rollout --steps 0"),
    ],
    r"--(nodes|parts) 1: must be at least 2": ["step --nodes 1", "batch --nodes 1", "comm --parts 1"],
    r"--kept /nowhere: no such folder": ["step --kept /nowhere"],
    r"--degree 14.6: must be above 0 and at most 9 for 10 nodes": ["step --nodes 10"],
    r"'ours' takes about [\d.]+ GB, [\d.]+ GB are free; lower --nodes": ["step --nodes 100000000000"],
    r"takes about [\d.]+ GB, .*leave --peers out": ["step --nodes 100000000 --peers"],
    r"takes about": [
        "batch --nodes 1000000",
        *(f"{name} --nodes 100000000000" for name in ("models", "partition", "comm", "pipeline", "rollout")),
    ],
    r"model\.name=EGN: unknown; did you mean EGNN": ["models --model EGN"],
    r"--parts 30: more parts than the 20 nodes": [
        f"{name} --nodes 20 --parts 30" for name in ("partition", "comm", "rollout")
    ],
    r"--halo ghost: unknown; use bridge or exchange": ["comm --halo ghost"],
}


@pytest.mark.parametrize(("line", "message"), [(line, message) for message, lines in WRONG.items() for line in lines])
def test_invalid_options_fail_before_any_work(line: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "block", lambda *_: pytest.fail("the benchmark has started"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(bench_cli.app, line.split())
    assert isinstance(result.exception, Failure), result.exception
    assert re.search(message, str(result.exception))
    assert "\n" not in str(result.exception)


def test_a_failed_worker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "check_options", lambda *_: None)
    options = bench_step.Options(nodes=50, degree=5, hidden=4, layers=1, tile=0, repeats=1)
    with pytest.raises(Failure, match=r"'ours': model\.tile=0: must be at least 1"):
        bench_step.measure_step(options, peers=False)


SMALLER = {
    "step": "--repeats 1 --hidden 8 --layers 1",
    "batch": "--graphs 2 --nodes 20 --repeats 1 --hidden 8 --layers 1",
    "models": "--graphs 1 --repeats 1 --hidden 8 --layers 1 --model EGNN --model SchNet",
    "partition": "",
    "comm": "--nodes 300 --hidden 8 --layers 1",
    "pipeline": "--repeats 1 --hidden 8 --layers 1",
    "rollout": "--steps 2 --hidden 8 --layers 1",
}


@pytest.mark.parametrize("name", SMALLER)
def test_the_example_of_each_help_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller numbers, and in this process."""
    assert set(SMALLER) == set(typer.main.get_command(bench_cli.app).commands)
    monkeypatch.setattr(bench_batch, "MAX_REPEATS", 1)
    monkeypatch.setattr(bench_batch, "SINGLE_NODES", (100, 3000))
    monkeypatch.setattr(bench_step, "measure_in_process", measure_here)
    text = CliRunner().invoke(bench_cli.app, [name, "--help"], env={"COLUMNS": "80"}).output
    example = text.partition("Example: ")[2]
    words = shlex.split(re.sub(r"--nodes \d+", "--nodes 300", re.sub(r"\\\s*\n", " ", example)) + " " + SMALLER[name])
    assert words[:2] == ["python", "tools/bench"]
    result = CliRunner().invoke(bench_cli.app, words[2:])
    assert result.exit_code == 0, result.output
    assert result.output.strip()
