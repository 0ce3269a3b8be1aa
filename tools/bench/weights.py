"""Time a training step on two processes, one slowed to half its speed: equal parts and `distegnn plan --measure`'s.

    python tools/bench/weights.py [NODES]    a block of particles; 8,000 by default

The slow process spends as much additional processor time as it used since the last collective call. Prints wall and
processor seconds of the slowest process, minima over all steps, because other programs only add to them. *ideal*: the work
of a step without a slow process, divided by 1.5 processes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import bench_data
import torch
from torch import Tensor

from dist_egnn.commands.partition import run_partition
from dist_egnn.config import Config
from dist_egnn.data.dataset import open_dataset
from dist_egnn.distributed import comm, spawn
from dist_egnn.planning import plan, trial
from dist_egnn.train import trainer
from dist_egnn.utils import part_weights

PARTS, SLOW, SPEED = 2, 1, 0.5
REPEATS = 7
MODEL = ["partition.method=bisection", "model.hidden=32", "model.layers=3"]
Trial = trial.Trial


class _Backward(torch.autograd.Function):
    """The identity; calls ``then`` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, then: Callable[[], None]) -> Tensor:
        ctx.then = then
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.then()
        return grad, None


class Slowed:
    """A group whose process takes 1 / SPEED of its time: it waits before each collective call."""

    def __init__(self, group: Any) -> None:
        self.group, self.since = group, time.thread_time()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def burn(self) -> None:
        """Spend processor time in proportion to the time used since the last call."""
        until = self.since + (time.thread_time() - self.since) / SPEED
        while time.thread_time() < until:
            pass
        self.since = time.thread_time()

    def sum(self, t: Tensor) -> Tensor:
        self.burn()
        return _Backward.apply(self.group.sum(t), self.burn)


measure_rank = trial.try_rank


def slowed_rank(group: comm.Comm, config: Config, number: int, *args: Any) -> Trial:
    """`trial.try_rank`, in a slowed process for rank SLOW."""
    alone = trial.SimulatedRank
    if number == SLOW:
        trial.SimulatedRank = lambda rank, size: _slow(alone(rank, size))  # type: ignore[assignment,misc,return-value]
    return measure_rank(group, config, number, *args)


def _slow(group: Any) -> Slowed:
    """Slow this process, including what follows the last sum of a backward pass."""
    slowed, original = Slowed(group), Tensor.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        slowed.burn()

    Tensor.backward = backward  # type: ignore[method-assign]
    return slowed


def step_times(group: comm.Comm, config: Config, slow: bool) -> list[float]:
    """Minimal seconds of a step: wall, processor."""
    own: Any = _slow(group) if slow and group.rank == SLOW else group
    dataset = open_dataset(config, group.rank, group.size)
    model = trainer.build_model(config, dataset.widths, own)
    graph = dataset[dataset.splits["train"][0]]
    clocks = time.perf_counter, time.thread_time
    times = []
    for _ in range(REPEATS + 1):
        group.max(0.0)  # a barrier
        if own is not group:
            own.since = time.thread_time()
        started = [clock() for clock in clocks]
        loss, _ = trainer.compute_loss(config, model, graph, own, torch.Generator().manual_seed(0))
        loss.backward()
        own.sum_gradients(model.parameters())
        times.append([clock() - start for clock, start in zip(clocks, started, strict=True)])
    return [min(column) for column in zip(*times[1:], strict=True)]


def main(nodes: int) -> None:
    """Partition, plan, partition by the proposed weights; then time all three cases in turn."""
    trial.try_rank = slowed_rank  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as name:
        folder = Path(name)
        radius = bench_data.write_data(folder / "block.h5", nodes, 3, 14.6)
        equal = bench_data.config_for(folder / "block.h5", radius, PARTS, MODEL)
        weighted = deepcopy(equal)
        run_partition(equal, folder / "equal")
        planned = plan.make_plan(equal)
        print(
            f"speeds {[round(rank.speed) for rank in planned.ranks]}, weights {part_weights.to_text(planned.weights)}"
        )
        weighted.partition.weights = planned.weights
        run_partition(weighted, folder / "weighted")
        cases = {"equal, none slow": (equal, False), "equal": (equal, True), "proposed": (weighted, True)}
        times: dict[str, list[list[float]]] = {case: [] for case in cases}
        for _ in range(3):
            for case, args in cases.items():
                ranks = spawn.run_ranks(step_times, PARTS, *args)
                times[case].append([max(column) for column in zip(*ranks, strict=True)])
    best = {case: [min(column) for column in zip(*rows, strict=True)] for case, rows in times.items()}
    ideal = [seconds * PARTS / (PARTS - 1 + SPEED) for seconds in best["equal, none slow"]]
    print("weights             step [s]  processor [s]  over ideal  processor over ideal")
    for case, (wall, cpu) in {**best, "ideal": ideal}.items():
        print(f"{case:18} {wall:9.3f} {cpu:14.3f} {wall / ideal[0]:11.2f} {cpu / ideal[1]:21.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", nargs="?", type=int, default=8_000)
    main(parser.parse_args().nodes)
