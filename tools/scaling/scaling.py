"""Measure a training step on P processes: each rank alone on one core, or real processes.

Both commands append rows to CSV files, from which predict.py makes tables and a plot (docs/scaling.md).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("bench", "emulated_hosts")]

import bench_data
import hosts
import pandas as pd
import torch
import typer
from dgl import DGLGraph
from model import NODE_WORK

from dist_egnn import config as configs
from dist_egnn.commands.partition import run_partition
from dist_egnn.data import halo
from dist_egnn.data.store import Store
from dist_egnn.distributed import comm, spawn
from dist_egnn.distributed.call_counter import simulated_group
from dist_egnn.errors import Failure
from dist_egnn.models import network
from dist_egnn.train import trainer
from dist_egnn.utils.console import example

MODES = ("bridge", "exchange")
RESULTS = Path(__file__).parents[2] / "docs" / "results"
TRIP_BYTES = (4, 1 << 14, 1 << 17, 1 << 20)
PORT = 29_556
RENO = 'echo reno > /proc/sys/net/ipv4/tcp_congestion_control && exec "$@"'  # set in each host
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)

Parts = Annotated[list[int], typer.Option("--parts", min=2, help="processes P; may be repeated")]
Nodes = Annotated[int, typer.Option("--nodes", min=2, help="nodes of the block, of degree 14.6")]
Method = Annotated[str, typer.Option("--method", help="as partition.method")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="timed steps after a warm-up; the median is reported")]
Out = Annotated[Path, typer.Option("--out", help="folder of the CSV files")]


def log(line: str) -> None:
    """Print progress to standard error."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def link_halos(parts: list[DGLGraph]) -> list[DGLGraph]:
    """Link the halos of all parts of a snapshot, as their ranks do together."""
    halos, x = [halo.get(graph).parts[0] for graph in parts], [graph.ndata["x"] for graph in parts]  # type: ignore[union-attr]
    for rank, own in enumerate(halos):
        far = torch.cat([there[rows] for there, rows in zip(x, own.recv_rows, strict=True)])
        own.complete(x[rank], [other.recv_rows[rank] for other in halos], far)
    return parts


def config_with_store(folder: Path, nodes: int, method: str, parts: int) -> configs.Config:
    """A config whose data are a store of a block in ``parts`` parts. Raises Failure if it cannot be partitioned."""
    if not (file := folder / "block.h5").exists():
        (folder / "radius").write_text(repr(bench_data.write_data(file, nodes, 1, 14.6)), encoding="utf-8")
    radius = float((folder / "radius").read_text(encoding="utf-8"))
    config = bench_data.config_for(file, radius, parts, [f"partition.method={method}"])
    with contextlib.redirect_stdout(sys.stderr):
        run_partition(config, folder / f"{method}-{parts}")
    return config


def build_learner(config: configs.Config) -> tuple[network.Network, torch.optim.Optimizer]:
    """A model for both halo modes and its optimizer."""
    torch.set_num_threads(1)
    widths = len(config.data.features or ()), len(config.data.node_attributes)
    model = trainer.build_model(config, widths, comm.SingleProcess())
    assert isinstance(model, network.Network)
    return model, torch.optim.Adam(model.parameters(), lr=config.train.lr)


def timed_step(config: configs.Config, learner: Any, graph: DGLGraph, group: comm.Comm) -> dict[str, float]:
    """Seconds of a training step as in trainer.steps: processor, wall, in collectives."""
    model, optimizer = learner
    model.prepare(graph)
    model.comm = group
    clocks = time.process_time, time.perf_counter, comm.collective_seconds
    started = [clock() for clock in clocks]
    optimizer.zero_grad(set_to_none=True)
    loss, mse = trainer.compute_loss(config, model, graph, group, torch.Generator().manual_seed(0))
    loss.backward()
    group.sum_gradients(model.parameters(), torch.stack([loss.detach(), mse, torch.zeros(())]))
    trainer.clip_gradients(model, config.train.clip)
    optimizer.step()
    times = [clock() - start for clock, start in zip(clocks, started, strict=True)]
    return dict(zip(("cpu_s", "wall_s", "comm_s"), times, strict=True))


def part_statistics(model: network.Network, graph: DGLGraph) -> dict[str, Any]:
    """The sizes of a part; interior: the share of the work in tiles without halo nodes."""
    sizes = {"own": graph.num_nodes(), "edges": graph.num_edges(), "cross": 0, "halo": 0}
    if halos := halo.get(graph):
        sizes |= {"cross": len(halos.src), "halo": max(halos.size, sum(map(len, halos.parts[0].send_rows)))}
    tiles = model.engine_and_tiles(graph)[1]
    work = [
        sum(t.edges.stop - t.edges.start + NODE_WORK * (t.nodes.stop - t.nodes.start) for t in group)
        for group in (tiles.interior, tiles.boundary)
    ]
    return {**sizes, "interior": 0.0 if tiles.is_single_block else work[0] / sum(work)}


def append_rows(name: str, rows: list[dict[str, Any]], folder: Path) -> None:
    """Append rows to a CSV file."""
    before = [pd.read_csv(folder / name)] if (folder / name).exists() else []
    pd.concat([*before, pd.DataFrame(rows)]).to_csv(folder / name, index=False, float_format="%.6g")


@app.command(epilog=example("python tools/scaling/scaling.py alone --nodes 5000 --parts 2 --parts 8 --out /tmp"))
def alone(
    parts: Parts,
    nodes: Nodes = 113_140,
    method: Method = "metis",
    repeats: Repeats = 3,
    ranks: Annotated[int, typer.Option("--ranks", help="maximum number of ranks; those with most work")] = 8,
    out: Out = RESULTS,
) -> None:
    """Time each rank's step alone, in both halo modes, alternating with a step of one process on the whole graph."""
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as name:
        config = config_with_store(Path(name), nodes, method, 1)
        single, ours = Store(config.data.path).read(0, 0), build_learner(config)
        for size in parts:
            config, rows, cases = (
                config_with_store(Path(name), nodes, method, size),
                list[dict[str, Any]](),
                list[Any](),
            )
            partitioned = Store(config.data.path)
            for mode in MODES:
                graphs = [partitioned.read(0, rank, mode == "exchange") for rank in range(size)]
                graphs = link_halos(graphs) if mode == "exchange" else graphs
                selected = sorted(
                    range(size), key=lambda r: -graphs[r].num_edges() - NODE_WORK * graphs[r].num_nodes()
                )[:ranks]
                cases += [(mode, rank, graphs[rank], part_statistics(ours[0], graphs[rank])) for rank in selected]
            for turn in range(repeats + 1):
                one = timed_step(config, ours, single, comm.SingleProcess())["cpu_s"]
                for mode, rank, graph, shape in cases:
                    with simulated_group(rank, size) as (group, counter):
                        times = timed_step(config, ours, graph, group)
                    sent = {
                        "calls": len(counter.calls),
                        "bytes": sum(max(c.payload, c.received) for c in counter.calls),
                    }
                    setting = {"nodes": nodes, "method": method, "parts": size, "mode": mode, "rank": rank}
                    rows.append({**setting, "turn": turn, **shape, **sent, **times, "one_s": one})
                slowest = [max(row["cpu_s"] for row in rows[-len(cases) :] if row["mode"] == mode) for mode in MODES]
                log(f"P={size} {method}, turn {turn}: one {one:.3f} s, slowest of {MODES} {slowest}")
            append_rows("scaling-ranks.csv", [row for row in rows if row["turn"]], out)  # the first turn only warms up


def measure_group(group: comm.Comm, config: configs.Config, repeats: int) -> list[dict[str, Any]]:
    """Time steps in both halo modes, alternating, and single trips of real ranks: seconds of the slowest."""
    ours, rows = build_learner(config), list[dict[str, Any]]()
    graphs = {mode: Store(config.data.path).read(0, group.rank, mode == "exchange") for mode in MODES}
    for turn in range(repeats + 1):
        for mode, graph in graphs.items():
            if halos := halo.get(graph):
                halos.link(graph.ndata["x"], group)  # once per snapshot, not part of a step
            group.max(0.0)  # a barrier
            times = {name: group.max(value) for name, value in timed_step(config, ours, graph, group).items()}
            rows += [{"what": mode, "bytes": 0, **times}] if turn else []
            log(f"rank {group.rank}, {mode}, turn {turn}: {times}")
    for nbytes in TRIP_BYTES * 15:
        splits = [max(1, nbytes // 4 // (group.size - 1)) * (rank != group.rank) for rank in range(group.size)]
        sent = torch.zeros(sum(splits))
        group.max(0.0)
        started = time.process_time(), time.perf_counter()
        group.all_to_all(sent, splits, splits)()
        times = {"cpu_s": time.process_time() - started[0], "wall_s": time.perf_counter() - started[1]}
        rows.append({"what": "trip", "bytes": sent.nbytes, **{name: group.max(value) for name, value in times.items()}})
    return rows


@app.command(
    epilog=example("python tools/scaling/scaling.py real --nodes 5000 --parts 2 --link 0:0 --link 5:100 --out /tmp")
)
def real(
    parts: Parts,
    nodes: Nodes = 113_140,
    method: Method = "metis",
    repeats: Repeats = 5,
    link: Annotated[
        list[str] | None,
        typer.Option("--link", help="DELAY_MS:RATE_MBIT of the network of emulated hosts; 0: no limit"),
    ] = None,
    out: Out = RESULTS,
) -> None:
    """Time steps and trips of P real processes on this machine or, with --link, on emulated hosts (needs root)."""
    for size in parts:
        with tempfile.TemporaryDirectory(prefix="dist_egnn-") as name:
            config = config_with_store(Path(name), nodes, method, size)
            setting = {"nodes": nodes, "method": method, "parts": size}
            if not link:
                rows = spawn.run_ranks(measure_group, size, config, repeats)[0]
                append_rows(
                    "scaling-runs.csv", [{**setting, "delay_ms": -1, "rate_mbit": 0, **row} for row in rows], out
                )
                continue
            (file := Path(name) / "config.yaml").write_text(configs.to_yaml(config), encoding="utf-8")
            with hosts.Hosts(names := [f"h{k}" for k in range(size)]) as up:
                for delay, rate in (map(float, value.split(":")) for value in link):
                    up.set(delay_ms=delay, rate_mbit=rate)
                    command = [sys.executable, __file__, "rank", *map(str, (file, up.address("h0"), repeats, size))]
                    argv = ["sh", "-c", RENO, "sh", *command]
                    ranks = [up.run(h, [*argv, str(k)], stdout=subprocess.PIPE) for k, h in enumerate(names)]
                    outputs = [rank.communicate(timeout=3600)[0] for rank in ranks]
                    if any(rank.returncode for rank in ranks):
                        raise Failure(f"--link {delay:g}:{rate:g}: a process on the hosts failed; see its error above")
                    link_set = {**setting, "delay_ms": delay, "rate_mbit": rate}
                    append_rows("scaling-runs.csv", [{**link_set, **row} for row in json.loads(outputs[0])], out)


@app.command(hidden=True)
def rank(file: Path, address: str, repeats: int, size: int, number: int) -> None:
    """A process on a host; prints its rows as JSON."""
    group = comm.join_hosts(number, size, address, PORT, hosts.INTERFACE, 60.0)
    print(json.dumps(measure_group(group, configs.load(str(file), []), repeats)))
    comm.leave_group()


if __name__ == "__main__":
    try:
        app()
    except (Failure, hosts.Failure) as failure:
        sys.exit(f"error: {failure}")
