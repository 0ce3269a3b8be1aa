"""Two processes, one slowed to half its speed: a step with equal parts, and with those that `distegnn plan --measure` proposes.

    python tools/bench/weights.py [NODES]    a block of particles, 8,000 unless told otherwise

The slow process burns as much processor time again as it uses, before it meets the others. Prints, of the slowest process, seconds
of a step by the clock and of the processor (what the clock would say on an idle machine), the least of all steps: other programs
only add to them. *ideal*: the work of a step with none slowed, spread over one and a half processes.
"""

from __future__ import annotations

import sys
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
    """The operand itself; what is to be done when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, then: Callable[[], None]) -> Tensor:
        ctx.then = then
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.then()
        return grad, None


class Slowed:
    """A group in whose process everything takes 1 / SPEED of its time, where it can be seen: whenever it meets the others."""

    def __init__(self, group: Any) -> None:
        self.group, self.since = group, time.thread_time()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def burn(self) -> None:
        """Use the processor for as long as makes up for the speed since the last time."""
        until = self.since + (time.thread_time() - self.since) / SPEED
        while time.thread_time() < until:
            pass
        self.since = time.thread_time()

    def sum(self, t: Tensor) -> Tensor:
        self.burn()
        return _Backward.apply(self.group.sum(t), self.burn)


def tried(group: comm.Comm, config: Config, number: int, *more: Any) -> Trial:
    """`trial.try_rank`, of a slow process where it is one."""
    plain = trial.SimulatedRank
    if number == SLOW:
        trial.SimulatedRank = lambda rank, size: _slow(plain(rank, size))  # type: ignore[assignment,misc,return-value]
    return rank_of(group, config, number, *more)


rank_of = trial.try_rank


def _slow(group: Any) -> Slowed:
    """Slow this process down: also what comes after the last sum of a backward pass."""
    slowed, plain = Slowed(group), Tensor.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        slowed.burn()

    Tensor.backward = backward  # type: ignore[method-assign]
    return slowed


def steps(group: comm.Comm, config: Config, slow: bool) -> list[float]:
    """Least seconds of a step: wall, processor."""
    own: Any = _slow(group) if slow and group.rank == SLOW else group
    samples = open_dataset(config, group.rank, group.size)
    model = trainer.build_model(config, samples.widths, own)
    graph = samples[samples.splits["train"][0]]
    taken = []
    for _ in range(REPEATS + 1):
        group.max(0.0)  # all begin together
        if own is not group:
            own.since = time.thread_time()
        begun = time.perf_counter(), time.thread_time()
        loss, _ = trainer.compute_loss(config, model, graph, own, torch.Generator().manual_seed(0))
        loss.backward()
        own.sum_gradients(model.parameters())
        taken.append([time.perf_counter() - begun[0], time.thread_time() - begun[1]])
    return [min(column) for column in zip(*taken[1:], strict=True)]


def main(nodes: int) -> None:
    """Partition, plan, partition again; then all three kinds of steps in turn."""
    trial.try_rank = tried  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as name:
        folder = Path(name)
        radius = bench_data.write_data(folder / "block.h5", nodes, 3, 14.6)
        equal = bench_data.config_of(folder / "block.h5", radius, PARTS, MODEL)
        weighted = deepcopy(equal)
        run_partition(equal, folder / "equal")
        planned = plan.make_plan(equal)
        print(
            f"speeds {[round(rank.speed) for rank in planned.ranks]}, weights {part_weights.to_text(planned.weights)}"
        )
        weighted.partition.weights = planned.weights
        run_partition(weighted, folder / "weighted")
        cases = {"equal, none slow": (equal, False), "equal": (equal, True), "proposed": (weighted, True)}
        found: dict[str, list[list[float]]] = {case: [] for case in cases}
        for _ in range(3):
            for case, args in cases.items():
                ranks = spawn.run_ranks(steps, PARTS, *args)
                found[case].append([max(column) for column in zip(*ranks, strict=True)])
    best = {case: [min(column) for column in zip(*each, strict=True)] for case, each in found.items()}
    ideal = [seconds * PARTS / (PARTS - 1 + SPEED) for seconds in best["equal, none slow"]]
    print("weights             step [s]  processor [s]  over ideal  processor over ideal")
    for case, (wall, cpu) in {**best, "ideal": ideal}.items():
        print(f"{case:18} {wall:9.3f} {cpu:14.3f} {wall / ideal[0]:11.2f} {cpu / ideal[1]:21.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8_000)
