"""`distegnn plan` against what then happens: for several sizes, a plan, then the very run that it speaks of, in turn."""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import bench_data, local, metrics, plan, runs, samples, train
from .comm import Comm
from .config import Config
from .config import load as load_config
from .errors import Failure
from .plan_data import Say
from .trajectories import Writer

BEGIN, END = "<!-- distegnn bench plan: begin -->", "<!-- distegnn bench plan: end -->"


def write_data(path: Path, nodes: int, snapshots: int, degree: float) -> float:
    """A trajectories file of a block that drifts apart, a third as many snapshots for validation; returns the radius."""
    x = bench_data.block(nodes)
    draw = np.random.default_rng(0)
    with Writer(path, {"command": "distegnn bench plan"}) as out:
        for split, count in (("train", snapshots), ("valid", -(-snapshots // 3))):
            velocity = draw.normal(0, bench_data.DRIFT * bench_data.SPACING, x.shape)
            frames = np.arange(count + 1)[:, None, None]
            out.add(
                x + velocity * frames,
                split=split,
                dt=1.0,
                source="distegnn bench plan",
                velocity=np.broadcast_to(velocity, (count + 1, *x.shape)),
                attributes={"viscosity": np.full(nodes, 0.01), "mass": draw.uniform(0.5, 2.0, nodes)},
            )
    return bench_data.radius_for(x, degree)


def config_of(path: Path, radius: float, parts: int, overrides: Sequence[str]) -> Config:
    """The config of a run on such a file."""
    data = ["data.horizon=1", f"data.radius={radius}", f"data.node_attributes=[{','.join(bench_data.ATTRIBUTES)}]"]
    features = f"data.features=[{','.join(bench_data.FEATURES)}]"
    return load_config(None, [f"data.path={path}", *data, features, f"partition.parts={parts}", *overrides])


def _train(group: Comm, config: Config, threads: int) -> dict[str, float]:
    """A run as `distegnn train` makes it; cpu_s: processor seconds from the start of a step to the start of the next, median
    of the epochs after the first, as in `reality`."""
    torch.set_num_threads(threads)
    starts: list[float] = []
    plain = train.loss_of

    def noting(*args: Any) -> Any:
        starts.append(time.thread_time())
        return plain(*args)

    train.loss_of = noting  # type: ignore[assignment]
    try:
        train.train(group, config)
    finally:
        train.loss_of = plain
    later = starts[len(starts) // config.train.epochs :] if config.train.epochs > 1 else starts
    return {
        "cpu_s": float(np.median(np.diff(later))),  # few of them have a validation between
        "peak_gb": metrics.peak_memory_gb(train.device_of(config, group.rank)),
    }


def reality(config: Config, folder: Path) -> dict[str, float]:
    """Train in ``folder``. Returns peak_gb of the largest process, step_s and epoch_s (medians of the epochs after the first),
    first_epoch_s, cpu_s, processor seconds of a step, mean of the processes."""
    import pandas as pd

    parts = samples.parts(config)
    config.run.dir = str(folder / "run")
    if parts > 1 and not samples.is_store(config.data.path):
        with contextlib.redirect_stdout(sys.stderr):  # what it says is no result here
            runs.run_partition(config, folder / "store")
    threads = torch.get_num_threads() if parts == 1 else 1
    ranks = local.run(_train, parts, config, threads, apart="spawn" if parts == 1 else "")
    table = pd.read_csv(folder / "run" / "metrics.csv")
    later = table.iloc[1:] if len(table) > 1 else table
    return {
        "peak_gb": max(rank["peak_gb"] for rank in ranks),
        "step_s": float(later["step_s"].median()),
        "epoch_s": float(later["epoch_s"].median()),
        "first_epoch_s": float(table["epoch_s"].iloc[0]),
        "cpu_s": statistics.mean(rank["cpu_s"] for rank in ranks),
    }


def compare(nodes: int, parts: int, snapshots: int, degree: float, overrides: Sequence[str]) -> dict[str, Any]:
    """One plan and its run. ``…_ratio``: planned over real; quiet: whether the machine had nothing else to do, without which the
    clock on the wall says nothing of a plan and the processor's (cpu_s) does."""
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as name:
        folder = Path(name)
        radius = write_data(folder / "block.h5", nodes, snapshots, degree)
        config = config_of(folder / "block.h5", radius, parts, overrides)
        planned = plan.make(config)
        real = reality(config, folder)
    found = {
        "peak_gb": max(rank.peak_gb for rank in planned.ranks),
        "step_s": planned.step_s,
        "epoch_s": planned.epoch_s,
        "cpu_s": statistics.mean(rank.cpu_s for rank in planned.ranks),
    }
    share = real["cpu_s"] / real["step_s"] / min(1.0, planned.cores / parts)
    ratios = {f"{key}_ratio": value / real[key] for key, value in found.items()}
    sizes = {"nodes": nodes, "parts": parts, "quiet": min(planned.busy, share) > 0.85}
    return {**sizes, "planned": found, "real": real, **ratios}


def run(
    cases: Sequence[tuple[int, int]], snapshots: int, degree: float, rounds: int, overrides: Sequence[str], say: Say
) -> list[dict[str, Any]]:
    """Every case (nodes, parts), ``rounds`` times; the round whose step's ratio is the median one stands for the case."""
    found = []
    for nodes, parts in cases:
        tried = []
        for _ in range(rounds):
            tried.append(compare(nodes, parts, snapshots, degree, overrides))
            one = tried[-1]
            say(
                f"{nodes:,} nodes, {parts} parts: planned/real memory {one['peak_gb_ratio']:.2f}, step {one['step_s_ratio']:.2f}"
            )
        found.append(sorted(tried, key=lambda one: one["step_s_ratio"])[len(tried) // 2])
    return found


COLUMNS = {
    "peak_gb": ("memory [GB]", 2),
    "step_s": ("step [s]", 3),
    "epoch_s": ("epoch [s]", 2),
    "cpu_s": ("CPU [s]", 3),
}
HEADER = ["nodes", "processes", *(name for title, _ in COLUMNS.values() for name in (title, "real", "ratio")), "quiet"]


def rows(found: list[dict[str, Any]]) -> list[list[str]]:
    """A line a case, as HEADER says."""
    lines = []
    for one in found:
        line = [f"{one['nodes']:,}", str(one["parts"])]
        for key, (_, digits) in COLUMNS.items():
            values = f"{one['planned'][key]:.{digits}f}", f"{one['real'][key]:.{digits}f}"
            line += [*values, f"{one[f'{key}_ratio']:.2f}"]
        lines.append([*line, "yes" if one["quiet"] else "no"])
    return lines


def check_page(page: Path) -> str:
    """A page's text. Raises Failure where it has no marks to write a table between."""
    text = page.read_text() if page.is_file() else ""
    if text.count(BEGIN) != 1 or END not in text.partition(BEGIN)[2]:
        raise Failure(f"--write {page}: holds no lines '{BEGIN}' and '{END}' to write between")
    return text


def write_table(page: Path, command: str, found: list[dict[str, Any]]) -> None:
    """Put the table, with the command that made it, between the marks of a page."""
    before, _, rest = check_page(page).partition(BEGIN)
    lines = [HEADER, ["---"] * len(HEADER), *rows(found)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    page.write_text(f"{before}{BEGIN}\n\n    {command}\n\n{table}\n\n{END}{rest.partition(END)[2]}")
