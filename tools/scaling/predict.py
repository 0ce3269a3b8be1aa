"""Tables and a plot of the measurements of scaling.py and the model of model.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from model import NODE_WORK, Fluid, Model, Network, Work

from dist_egnn.utils.console import example
from dist_egnn.viz.plots import pyplot

DOCS = Path(__file__).parents[2] / "docs"
LINKS = {"10 GbE": (30e-6, 10e9 / 8), "100 GbE": (10e-6, 100e9 / 8)}  # assumed latency in seconds and bytes per second
PUBLISHED = (8, 7.34)  # GPUs, speed-up
COLOURS = {"bridge": "C0", "exchange": "C1"}
KEYS = ["nodes", "method", "parts", "mode"]
SIZES = (1, 8, 64, 256, 1024)
app = typer.Typer(pretty_exceptions_enable=False)


def print_table(title: str, header: str, rows: Any) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n\n| {header} |\n|{'---|' * (header.count('|') + 1)}")
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in rows))


def fit_software(trips: pd.DataFrame) -> Network:
    """The cost of a trip without a network: medians of wall time on two processes; a message from the minimal processor time
    on several numbers of processes."""
    two, small = trips[trips.parts == 2].groupby("bytes").wall_s.median(), trips.groupby(["parts", "bytes"]).cpu_s.min()
    least = small.reset_index().groupby("parts").first().reset_index()
    message = float(np.polyfit(least.parts - 1, least.cpu_s, 1)[0]) if len(least) > 1 else 0.0
    bandwidth = (two.index[-1] - two.index[0]) / (two.iloc[-1] - two.iloc[0])
    return Network(0.0, float(bandwidth), max(0.0, float(two.iloc[0]) - message), message)


def add_network(here: Network, latency: float, bandwidth: float) -> Network:
    """The software cost of ``here`` with the latency and bandwidth of a network; transfer times add up."""
    rate = 1 / (1 / here.bandwidth + (1 / bandwidth if bandwidth else 0.0))
    return Network(latency, rate, here.call, here.message)


def median_rows(table: pd.DataFrame) -> pd.DataFrame:
    """One row with median seconds for rows that differ in the turn only."""
    keys = [key for key in table if not key.endswith("_s") and key != "turn"]
    return table.groupby(keys, sort=False).agg({key: "median" for key in table if key.endswith("_s")}).reset_index()


def strong_scaling(ranks: pd.DataFrame, network: Network) -> pd.DataFrame:
    """A row for each (nodes, method, parts, mode): work of the slowest rank, longest wait, step, speed-up.

    balance: the slowest rank over the mean of the measured ones; even: the speed-up if work were edges + 4 nodes, without
    waiting.
    """
    work = (ranks.edges + ranks.cross + NODE_WORK * ranks.own).groupby([ranks[key] for key in KEYS])
    rows, whole = list[dict[str, Any]](), work.sum().max()  # exchange keeps all edges
    for keys, group in ranks.groupby(KEYS, sort=False):
        own, size, one = group.cpu_s.max(), keys[2], group.one_s.iloc[0]
        wait = max(Model().wait(network, size, r.halo, r.interior * r.cpu_s) for r in group.itertuples())
        measures = {"balance": own / group.cpu_s.mean(), "even": whole / work.max()[keys], "bytes": group.bytes.max()}
        step = {"one": one, "own": own, "wait": wait, "step": own + wait, "speedup": one / (own + wait)}
        rows.append({**dict(zip(KEYS, keys, strict=True)), **step, **measures})
    return pd.DataFrame(rows)


def compare_with_runs(ranks: pd.DataFrame, runs: pd.DataFrame) -> Iterator[list[Any]]:
    """Real steps of two processes and the model's: with the link that single trips show, with the link as set and, on
    emulated hosts, the real step without limits plus the wait that the link adds."""
    links = ["nodes", "delay_ms", "rate_mbit"]
    trips = {
        keys: fit_software(group) for keys, group in runs[(runs.what == "trip") & (runs.parts == 2)].groupby(links)
    }
    real = median_rows(runs[(runs.what != "trip") & (runs.parts == 2)])
    for r in real.itertuples():
        own = ranks.query("nodes == @r.nodes and method == @r.method and parts == 2 and mode == @r.what")
        if own.empty:
            continue
        (m,) = strong_scaling(own, trips[r.nodes, r.delay_ms, r.rate_mbit]).itertuples()
        link, estimates = "this machine", ["", ""]
        if r.delay_ms >= 0:
            link = f"{r.delay_ms:g} ms, " + (f"{r.rate_mbit:g} Mbit/s" if r.rate_mbit else "no limit")
            free = trips[r.nodes, 0, 0]
            network = add_network(free, r.delay_ms / 1e3, r.rate_mbit * 125e3)
            (unlimited,), (as_set,) = strong_scaling(own, free).itertuples(), strong_scaling(own, network).itertuples()
            query = "delay_ms == 0 and rate_mbit == 0 and nodes == @r.nodes and what == @r.what"
            base = real.query(query).wall_s.iloc[0]
            estimates = [f"{s:.3f}, {s / r.wall_s - 1:+.0%}" for s in (as_set.step, base + m.wait - unlimited.wait)]
        times = [f"{s:.3f}" for s in (m.own, m.wait, r.comm_s, m.step, r.wall_s)]
        yield [link, f"{r.nodes:,}", r.what, *times, f"{m.step / r.wall_s - 1:+.0%}", *estimates]


def fit_work(ranks: pd.DataFrame) -> tuple[Work, Fluid]:
    """The work of large parts, and the shape of a part with neighbours on all sides (the most halo nodes of 64)."""
    big = ranks[(ranks.own > 5_300) & (ranks.nodes == ranks.nodes.max())]
    work = Work.fit(*(big[name].to_numpy(float) for name in ("own", "edges", "cross", "halo", "cpu_s")))
    inner = ranks[(ranks.nodes == ranks.nodes.max()) & (ranks.parts == 64)].sort_values("halo").iloc[-1]
    surface = inner.own ** (2 / 3)
    shape = (inner.edges + inner.cross) / inner.own, inner.halo / surface, inner.cross / surface
    return work, Fluid(*map(float, shape))


def plot_speedup(path: Path, measured: pd.DataFrame, lines: dict[tuple[str, str], list[float]]) -> None:
    """Plot the speed-up up to 8 and up to 1,024 processes."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for (mode, method), one in measured.groupby(["mode", "method"]):
        one = one.sort_values("parts")
        colour, style, face = COLOURS[mode], *(("o-", COLOURS[mode]) if method == "metis" else ("s", "w"))
        small = one[one.parts <= 8]
        left.plot(small.parts, small.speedup, style, color=colour, mfc=face, label=f"{mode}, {method}")
        if method == "metis":
            right.plot(one.parts, one.speedup, style, color=colour, label=f"{mode}, 113,140 nodes, ranks measured")
    for (words, mode), values in lines.items():
        style = ":" if "rank" in words else "--"
        right.plot(SIZES, values, style, color=COLOURS[mode], label=f"{mode}, {words}, predicted")
    left.plot(*PUBLISHED, "k*", ms=11, label=f"published, on GPUs: {PUBLISHED[1]}")
    for axes, ticks in ((left, range(1, 9)), (right, SIZES)):
        axes.plot([1, ticks[-1]], [1, ticks[-1]], color="0.6", lw=1, zorder=0, label="ideal")
        axes.set(xlabel="processes P", ylabel="speed-up over one process", xscale="linear" if axes is left else "log")
        axes.set_xticks(ticks, map(str, ticks))
        axes.grid(alpha=0.3)
    left.set_title("113,140 nodes; ranks measured, 10 GbE modelled", fontsize=11)
    right.set_title("10 GbE, to 1,024 processes", fontsize=11)
    right.set(yscale="log")
    right.minorticks_off()
    left.legend(fontsize=8)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


@app.command(epilog=example("python tools/scaling/predict.py --results docs/results --plot docs/img/scaling.png"))
def main(
    folder: Annotated[Path, typer.Option("--results", help="folder of the CSV files")] = DOCS / "results",
    plot: Annotated[Path, typer.Option("--plot", help="PNG to draw")] = DOCS / "img" / "scaling.png",
) -> None:
    """Print tables of the speed-up, of the model against real runs and of predictions, and draw the plot."""
    raw, runs = (pd.read_csv(folder / f"scaling-{name}.csv") for name in ("ranks", "runs"))
    ranks = median_rows(raw)
    here = fit_software(runs[(runs.what == "trip") & (runs.delay_ms < 0)])
    costs = f"{here.call * 1e6:.0f} µs a call, {here.message * 1e6:.1f} µs a message"
    print(f"software: {costs}, {here.bandwidth / 1e6:.0f} MB/s")
    networks = {name: add_network(here, *link) for name, link in LINKS.items()}
    tables = {
        name: strong_scaling(ranks[ranks.nodes == ranks.nodes.max()], network) for name, network in networks.items()
    }
    measured, ten = tables["10 GbE"], networks["10 GbE"]
    head = "P | method | mode | one [s] | slowest rank [s] | slowest/mean | MB per step | waiting [ms] | "
    rows = []
    for r in measured.sort_values(["method", "parts"], ascending=[False, True], kind="stable").itertuples():
        speed = [f"{one.speedup[r.Index]:.2f}" for one in tables.values()]
        own = f"{r.one:.2f}", f"{r.own:.3f}", f"{r.balance:.3f}"
        rows.append(
            [r.parts, r.method, r.mode, *own, f"{r.bytes / 1e6:.2f}", f"{1e3 * r.wait:.1f}", *speed, f"{r.even:.2f}"]
        )
    print_table("Strong scaling", head + " | ".join(LINKS) + " | by count", rows)
    head = "link | nodes | mode | own [s] | waiting [s] | real | step [s] | real | error | by the link as set | beyond no limit"
    print_table("Check", head, compare_with_runs(ranks, runs))
    compact = "method != 'random'"  # random parts are all surface and have hardly an edge in bridge mode
    work, fluid = fit_work(ranks.query(compact))
    print(f"\n{work}\n{fluid}")
    rows, lines = [], {}
    for words, nodes, weak in (("10,000,000 nodes", 1e7, False), ("976,563 nodes per rank", 1e9 / 1024, True)):
        for mode in COLOURS:
            steps = [fluid.step(work, ten, p, nodes if weak else nodes / p, mode == "exchange") for p in SIZES]
            gains = [steps[0][0] / step for step, _ in steps]
            for p, (step, wait), gain in zip(SIZES, steps, gains, strict=True):
                rows.append([words, mode, p, *(f"{float(f'{value:.3g}'):,g}" for value in (step, 1e3 * wait, gain))])
            lines[words, mode] = [g * p for g, p in zip(gains, SIZES, strict=True)] if weak else gains
    print_table("Predictions, 10 GbE", "what | mode | P | step [s] | waiting [ms] | speed-up, or efficiency", rows)
    plot_speedup(plot, measured.query(compact), lines)


if __name__ == "__main__":
    app()
