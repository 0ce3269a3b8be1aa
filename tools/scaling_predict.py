"""What scaling.py measured and scaling_model.py makes of it, as tables and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from scaling_model import NODE, Fluid, Model, Network, Work

from dist_egnn.plots import pyplot
from dist_egnn.terminal import example

DOCS = Path(__file__).parents[1] / "docs"
LINKS = {"10 GbE": (30e-6, 10e9 / 8), "25 GbE": (10e-6, 25e9 / 8), "100 GbE": (10e-6, 100e9 / 8)}  # s, bytes/s: assumed
PUBLISHED = (8, 7.34)
COLOURS = {"bridge": "C0", "exchange": "C1"}
SIZES = (1, 8, 64, 256, 1024)
app = typer.Typer(pretty_exceptions_enable=False)


def table(title: str, header: str, rows: Any) -> None:
    """A table as docs/scaling.md has it."""
    print(f"\n{title}\n\n| {header} |\n|{'---|' * (header.count('|') + 1)}")
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in rows))


def software(trips: pd.DataFrame) -> Network:
    """What a trip costs here without a network: the wall's clock on two processes; a message's share by the processor's on more."""
    two = trips[trips.parts == 2].sort_values("bytes")
    least, most = two.iloc[0], two.iloc[-1]
    small = trips[trips.bytes == trips.groupby("parts").bytes.transform("min")]
    message = max(0.0, float(np.polyfit(small.parts - 1, small.cpu_s, 1)[0])) if small.parts.nunique() > 1 else 0.0
    bandwidth = (most.bytes - least.bytes) / (most.wall_s - least.wall_s)
    return Network(0.0, bandwidth, max(0.0, least.wall_s - message), message)


def over(here: Network, latency: float, bandwidth: float) -> Network:
    """The software of ``here`` over a network; bytes pass one after the other."""
    rate = 1 / (1 / here.bandwidth + (1 / bandwidth if bandwidth else 0.0))
    return Network(latency, rate, here.call, here.message)


def taken(table: pd.DataFrame, seconds: str = "median") -> pd.DataFrame:
    """Rows that are alike but for the turn and seconds as one: medians, or the least seconds ("min")."""
    keys = [key for key in table if not key.endswith("_s") and key != "turn"]
    return table.groupby(keys, sort=False).agg({key: seconds for key in table if key.endswith("_s")}).reset_index()


def strong(ranks: pd.DataFrame, network: Network) -> pd.DataFrame:
    """A row for each (nodes, method, parts, mode): the slowest rank's work, the longest wait, the step, the speed-up; balance: the
    slowest rank over the mean of those measured, even: the same by count of edges and nodes."""
    rows = []
    for keys, group in ranks.groupby(["nodes", "method", "parts", "mode"], sort=False):
        own, size, one = group.cpu_s.max(), keys[2], group.one_s.iloc[0]
        wait = max(Model().wait(network, size, r.halo, r.interior * r.cpu_s) for r in group.itertuples())
        count = group.edges + group.cross + NODE * group.own
        balance, even = own / group.cpu_s.mean(), count.max() / count.mean()
        rows.append((*keys, one, own, balance, even, group.bytes.max(), wait, own + wait, one / (own + wait)))
    return pd.DataFrame(
        rows,
        columns=[
            "nodes",
            "method",
            "parts",
            "mode",
            "one",
            "own",
            "balance",
            "even",
            "bytes",
            "wait",
            "step",
            "speedup",
        ],
    )


def check(ranks: pd.DataFrame, runs: pd.DataFrame) -> Iterator[list[Any]]:
    """Real steps of two processes beside the model's, once with the link as single trips on it show it, once as it was set."""
    trips = runs[(runs.what == "trip") & (runs.parts == 2)]
    free = software(trips[(trips.delay_ms == 0) & (trips.rate_mbit == 0)])
    for r in runs[(runs.what != "trip") & (runs.parts == 2)].itertuples():
        own = ranks[
            (ranks.nodes == r.nodes) & (ranks.method == r.method) & (ranks.parts == 2) & (ranks["mode"] == r.what)
        ]
        shown = software(
            trips[(trips.delay_ms == r.delay_ms) & (trips.rate_mbit == r.rate_mbit) & (trips.nodes == r.nodes)]
        )
        (m,) = strong(own, shown).itertuples()
        times = (
            f"{m.own:.3f}",
            f"{m.wait:.3f}",
            f"{r.comm_s:.3f}",
            f"{m.step:.3f}",
            f"{r.wall_s:.3f}",
            f"{m.step / r.wall_s - 1:+.0%}",
        )
        link, nominal = "this machine", ""
        if r.delay_ms >= 0:
            link = f"{r.delay_ms:g} ms, " + (f"{r.rate_mbit:g} Mbit/s" if r.rate_mbit else "no limit")
            (m,) = strong(own, over(free, r.delay_ms / 1e3, r.rate_mbit * 1e6 / 8)).itertuples()
            nominal = f"{m.step:.3f}, {m.step / r.wall_s - 1:+.0%}"
        yield [link, f"{r.nodes:,}", r.what, *times, nominal]


def far(
    fluid: Fluid, work: Work, network: Network, mode: str, nodes: float, per_rank: bool
) -> list[tuple[float, float, float]]:
    """Step, waiting, and speed-up (of ``nodes`` in all) or efficiency (``nodes`` a rank) for each of SIZES."""
    one = fluid.step(work, network, 1, nodes, False)[0]
    found = []
    for size in SIZES:
        step, wait = fluid.step(work, network, size, nodes if per_rank else nodes / size, mode == "exchange")
        found.append((step, wait, one / step))
    return found


def fitted(ranks: pd.DataFrame) -> tuple[Work, Fluid]:
    """The work of parts in tiles, and the shape of a part with neighbours on all sides: of 64, the one with most halo nodes."""
    big = ranks[(ranks.own > 5_300) & (ranks.nodes == ranks.nodes.max())]
    work = Work.fit(*(big[name].to_numpy(float) for name in ("own", "edges", "cross", "halo", "cpu_s")))
    inner = ranks[(ranks.nodes == ranks.nodes.max()) & (ranks.parts == 64)].sort_values("halo").iloc[-1]
    surface = inner.own ** (2 / 3)
    return work, Fluid((inner.edges + inner.cross) / inner.own, inner.halo / surface, inner.cross / surface)


def draw(path: Path, near: pd.DataFrame, lines: dict[tuple[str, str], list[float]]) -> None:
    """Speed-up to 8, and predictions to 1,024."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    few = near[near.parts <= 8]
    for mode, colour in COLOURS.items():
        for method, style in (("metis", "o-"), ("bisection", "s")):
            one = few[(few["mode"] == mode) & (few.method == method)].sort_values("parts")
            left.plot(
                one.parts,
                one.speedup,
                style,
                color=colour,
                mfc="w" if style == "s" else colour,
                label=f"{mode}, {method}",
            )
        one = near[(near["mode"] == mode) & (near.method == "metis")].sort_values("parts")
        right.plot(one.parts, one.speedup, "o-", color=colour, label=f"{mode}, 113,140 nodes, ranks measured")
    for (mode, words), values in lines.items():
        right.plot(
            SIZES, values, "--" if "10" in words else ":", color=COLOURS[mode], label=f"{mode}, {words}, predicted"
        )
    left.plot(*PUBLISHED, "k*", ms=11, label="published, 8 GPUs: 7.34")
    for axes, most in ((left, 8), (right, SIZES[-1])):
        axes.plot([1, most], [1, most], color="0.6", lw=1, zorder=0, label="ideal")
        axes.set(xlabel="processes P", ylabel="speed-up over one process")
        axes.grid(alpha=0.3)
    right.set(xscale="log", yscale="log", title="10 GbE, to 1,024 processes")
    left.set(title="113,140 nodes: each rank's work measured alone, 10 GbE modelled")
    left.legend(fontsize=8), right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


@app.command(epilog=example("python tools/scaling_predict.py --results docs/results --plot docs/img/scaling.png"))
def main(
    folder: Annotated[Path, typer.Option("--results", help="folder of the CSV files")] = DOCS / "results",
    plot: Annotated[Path, typer.Option("--plot", help="PNG to draw")] = DOCS / "img" / "scaling.png",
) -> None:
    """Tables of speed-up, of the model beside real runs, of predictions; and the plot."""
    raw, runs = (pd.read_csv(folder / f"scaling-{name}.csv") for name in ("ranks", "runs"))
    ranks, runs = taken(raw), taken(runs)
    here = software(runs[(runs.what == "trip") & (runs.delay_ms < 0)])
    print(
        f"here: {here.call * 1e6:.0f} µs a call, {here.message * 1e6:.1f} µs a message, {here.bandwidth / 1e6:.0f} MB/s"
    )
    networks = {name: over(here, *link) for name, link in LINKS.items()}
    found = {name: strong(ranks[ranks.nodes == ranks.nodes.max()], network) for name, network in networks.items()}
    near = found["10 GbE"]
    best = strong(taken(raw[raw.nodes == raw.nodes.max()], "min"), networks["10 GbE"])
    head = "P | method | mode | one [s] | slowest rank [s] | slowest/mean | work | MB a step | waiting [ms] | "
    rows = []
    for r in near.itertuples():
        own = (
            f"{r.one:.2f}",
            f"{r.own:.3f}",
            f"{r.balance:.3f}",
            f"{r.even:.3f}",
            f"{r.bytes / 1e6:.2f}",
            f"{1e3 * r.wait:.1f}",
        )
        rows.append(
            [r.parts, r.method, r.mode, *own, *(f"{one.speedup[r.Index]:.2f}" for one in (*found.values(), best))]
        )
    table("Strong scaling", head + " | ".join(LINKS) + " | of the least times, 10 GbE", rows)
    head = "link | nodes | mode | own [s] | waiting [s] | real | step [s] | real | error | by the link as set"
    table("Check", head, check(ranks, runs))
    work, fluid = fitted(ranks)
    print(f"\n{work}\n{fluid}")
    rows, lines = [], {}
    for mode in COLOURS:
        for words, nodes, weak in (("10,000,000 nodes", 1e7, False), ("1,000,000 nodes a rank", 1e6, True)):
            for name, network in networks.items():
                values = far(fluid, work, network, mode, nodes, weak)
                if name == "10 GbE" and not weak:
                    lines[mode, words] = [speedup for *_, speedup in values]
                for size, (step, wait, gain) in zip(SIZES, values, strict=True):
                    rows.append([words, mode, name, size, f"{step:.3g}", f"{1e3 * wait:.3g}", f"{gain:.3g}"])
    table("Predictions", "what | mode | network | P | step [s] | waiting [ms] | speed-up or efficiency", rows)
    draw(plot, near, lines)


if __name__ == "__main__":
    app()
