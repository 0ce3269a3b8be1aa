"""What a short trial tells of a rank: real steps on its own part of real snapshots, alone, and the group's sums on their own.

A rank is tried in a process of its own, forked as a rank of a run is, one rank after the other: memory and time are then
those of training, however many ranks there are for the cores.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import dgl
import torch
from dgl import DGLGraph
from torch import Tensor

from . import devices, metrics, train
from .comm import Alone, Comm
from .config import Config
from .samples import ahead, kept_bytes, open_samples

PHASES = ("forward", "backward", "gradients")
LEAST, SECONDS, MOST = (
    3,
    2.0,
    20,
)  # timed batches at least; passes until so much processor time is spent; passes at most


@dataclass(frozen=True)
class Call:
    """A sum over the group: when in a step, how many numbers of how many bytes."""

    phase: str
    numbers: int
    width: int


class _Noted(torch.autograd.Function):
    """The operand itself, where a group would sum; what would be sent in the backward pass is noted there."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, note: Callable[[str, Tensor], None]) -> Tensor:
        ctx.note = note
        note("forward", t)
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.note("backward", grad)
        return grad, None


class Lonely(Alone):
    """A rank of a group whose other ranks are not there: sums are its own share, and ``calls`` is what it would send."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.calls: list[Call] = []

    def _note(self, phase: str, t: Tensor) -> None:
        if self.size > 1:
            self.calls.append(Call(phase, t.numel(), t.element_size()))

    def sum(self, t: Tensor) -> Tensor:
        return _Noted.apply(t, self._note)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], beside: Tensor | None = None) -> Tensor | None:
        found = list(parameters)
        super().sum_gradients(found, beside)
        more = [] if beside is None else [beside]
        self._note("gradients", torch.cat([*(p.grad.reshape(-1) for p in found if p.grad is not None), *more]))
        return beside


@dataclass(frozen=True)
class Times:
    """Seconds, medians. batch: forward and backward of a batch; forward: forward alone, without gradients; finish: the optimiser's
    step; fresh: reading a batch and cutting it into tiles; ready: the same when its samples are in memory."""

    batch: float
    forward: float
    finish: float
    fresh: float
    ready: float


@dataclass(frozen=True)
class Trial:
    """What one rank showed, by the clock on the wall and by the processor's, which runs only while the thread does: ``wall`` is
    what it takes now, ``cpu`` what it would take on a machine with nothing else to do (CPU and one thread; else the same).

    peak: the process's largest memory in bytes, with the tried samples held; held_ratio: what a held sample takes for each byte
    that it is counted as; calls: of one step; busy: processor seconds of a second of the steps; fastest: processor seconds of a
    batch, each at its best (other programs only add to them), mean of the batches.
    """

    wall: Times
    cpu: Times
    busy: float
    peak: float
    held_ratio: float
    calls: list[Call]
    fastest: float


def held_bytes(graph: DGLGraph) -> int:
    """Bytes that a graph keeps: its fields, its structure as far as it is made, its tiles."""
    found = sum(frame[name].nbytes for frame in (graph.ndata, graph.edata) for name in frame)
    made = graph.formats()["created"]
    n, e = graph.num_nodes(), graph.num_edges()
    width = 4 if graph.idtype == torch.int32 else 8
    found += width * (2 * e * ("coo" in made) + (n + 2 * e) * sum(name in made for name in ("csc", "csr")))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(graph.__dict__)}
    return found + sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors within dicts, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def rank(_: Comm, config: Config, number: int, size: int, batches: Sequence[Sequence[int]], threads: int) -> Trial:
    """Try rank ``number`` of ``size`` on batches of snapshots, in passes as a run's epochs are: steps, then predictions."""
    import torch.utils.tensorboard  # rank 0 of a run loads it: memory

    torch.set_num_threads(threads)
    group = Lonely(number, size)
    device = train.device_of(config, number)
    samples = open_samples(config, number, size)
    model = train.build_model(config, samples.widths, group).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.lr)
    prepare = getattr(model, "prepare", lambda graph: graph)
    clocks = time.perf_counter, time.thread_time
    seconds: dict[str, list[tuple[float, ...]]] = {"make": [], "batch": [], "finish": [], "forward": []}

    @contextlib.contextmanager
    def timed(what: str) -> Iterator[None]:
        started = [clock() for clock in clocks]
        yield
        devices.wait(device)
        seconds[what].append(tuple(clock() - then for clock, then in zip(clocks, started, strict=True)))

    def make(numbers: Sequence[int]) -> DGLGraph:
        with timed("make"):
            return prepare(samples[numbers[0]] if len(numbers) == 1 else dgl.batch([samples[n] for n in numbers]))

    def one_pass() -> None:
        model.train()
        for graph in ahead(make, batches):
            group.calls.clear()
            optimizer.zero_grad(set_to_none=True)
            with timed("batch"):
                loss, _ = train.loss_of(config, model, graph, group, torch.Generator().manual_seed(0))
                loss.backward()
            with timed("finish"):
                group.sum_gradients(model.parameters(), torch.zeros(3, device=device))  # as train.steps
                optimizer.step()
        calls[:] = group.calls
        model.eval()
        with torch.no_grad():
            for graph in ahead(make, batches[:1]):
                with timed("forward"):
                    model(graph)

    calls: list[Call] = []
    one_pass()  # the first reads
    seconds["fresh"] = seconds.pop("make")[: len(batches)]
    seconds["make"] = []
    for what in ("batch", "finish", "forward"):
        seconds[what].clear()
    spent = time.process_time()
    for _pass in range(MOST):
        one_pass()
        if len(seconds["batch"]) >= LEAST and time.process_time() - spent > SECONDS:
            break
    graphs = [samples[n] for n in dict.fromkeys(n for numbers in batches for n in numbers)]
    counted = sum(kept_bytes(g.num_nodes(), g.num_edges()) for g in graphs)
    seconds["ready"] = seconds.pop("make")
    wall, cpu = (
        Times(**{what: statistics.median(one[k] for one in each) for what, each in seconds.items()}) for k in (0, 1)
    )
    plain = device.type == "cpu" and threads == 1  # else work is done elsewhere than in the thread that waits for it
    busy = sum(one[1] for one in seconds["batch"]) / sum(one[0] for one in seconds["batch"])
    peak = metrics.peak_memory_gb(device) * 1e9
    ratio = sum(map(held_bytes, graphs)) / max(counted, 1)
    took, each = [one[int(plain)] for one in seconds["batch"]], len(batches)
    fastest = statistics.mean(min(took[k::each]) for k in range(each))
    return Trial(wall, cpu if plain else wall, busy if plain else 1.0, peak, ratio, calls, fastest)


def exchange(group: Comm, calls: Sequence[Call], repeats: int = 10) -> tuple[dict[str, float], float]:
    """Seconds that a step's sums take this group when nothing else is to be done, by phase, medians; and the bytes of memory that
    being in a group costs a process."""
    before = metrics.peak_memory_gb()
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for _ in range(repeats + 1):
        for phase in PHASES:
            kinds = {4: torch.float32, 8: torch.float64}
            tensors = [torch.zeros(c.numbers, dtype=kinds[c.width]) for c in calls if c.phase == phase]
            group.max(0.0)  # all start together
            started = time.perf_counter()
            for tensor in tensors:
                group.sum(tensor)
            seconds[phase].append(time.perf_counter() - started)
    grown = (metrics.peak_memory_gb() - before) * 1e9
    return {phase: statistics.median(each[1:]) for phase, each in seconds.items()}, grown
