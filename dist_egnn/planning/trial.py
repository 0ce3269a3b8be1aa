"""What a short trial tells of a rank: real steps on its own part of real snapshots, alone, and the group's sums on their own.

A rank is tried in a process of its own, forked as a rank of a run is, one rank after the other: memory and time are then
those of training, however many ranks there are for the cores.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from dgl import DGLGraph
from torch import Tensor

from ..config import Config
from ..data import halo
from ..data.dataset import open_dataset, prefetch
from ..data.store import Store
from ..distributed.comm import Comm, SingleProcess, sent_bytes
from ..train import metrics, trainer
from ..utils import devices, resources

Told = dict[int, tuple[list[np.ndarray], np.ndarray]]  # snapshot → what a halo learns of the others: see Halo.complete

PHASES = ("forward", "backward", "gradients")
# Timed batches at least; passes until so much processor time is spent, as the peak of a graph that runs whole grows over some
# twenty steps; passes at most.
LEAST, SECONDS, MOST = 3, 8.0, 20


@dataclass(frozen=True)
class Call:
    """A sum over the group: when in a step, how many numbers of how many bytes. With give and take an exchange of rows of so
    many numbers: give[r] of them to rank r, take[r] from it."""

    phase: str
    numbers: int
    width: int
    give: tuple[int, ...] = ()
    take: tuple[int, ...] = ()

    @property
    def payload(self) -> int:
        """Bytes that the rank hands over."""
        return self.numbers * self.width * (sum(self.give) if self.give else 1)

    def sent(self, size: int) -> float:
        """Bytes that the rank sends, in a group of ``size``."""
        return self.payload if self.give else sent_bytes(self.payload, size)


class _Noted(torch.autograd.Function):
    """The operand itself, where a group would sum; what would be sent in the backward pass is noted there."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, note: Callable[[Tensor], None]) -> Tensor:
        ctx.note = note
        note(t)
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.note(grad)
        return grad, None


class Lonely(SingleProcess):
    """A rank of a group whose other ranks are not there: sums are its own share, rows that come are copies of those that go,
    and ``calls`` is what it would send."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.calls: list[Call] = []
        self._phase = PHASES[0]

    def at(self, phase: str) -> None:
        """What follows is of this phase; the first one begins a step."""
        self._phase = phase
        if phase == PHASES[0]:
            self.calls = []

    def _note(self, t: Tensor) -> None:
        if self.size > 1:
            self.calls.append(Call(self._phase, t.numel(), t.element_size()))

    def sum(self, t: Tensor) -> Tensor:
        return _Noted.apply(t, self._note)

    def all_to_all(
        self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Callable[[], Tensor]:
        self.calls.append(
            Call(self._phase, math.prod(rows.shape[1:]), rows.element_size(), tuple(send_counts), tuple(receive_counts))
        )
        came = torch.arange(sum(receive_counts), device=rows.device) % max(len(rows), 1)
        return lambda: rows.index_select(0, came) if len(rows) else rows.new_zeros(len(came), *rows.shape[1:])

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], extra: Tensor | None = None) -> Tensor | None:
        found = list(parameters)
        super().sum_gradients(found, extra)
        more = [] if extra is None else [extra]
        self.at("gradients")
        self._note(torch.cat([*(p.grad.reshape(-1) for p in found if p.grad is not None), *more]))
        return extra


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
    that it is counted as; calls: of one step on each batch; busy: processor seconds of a second of the steps; fastest:
    processor seconds of a batch, each at its best (other programs only add to them), mean of the batches.
    """

    wall: Times
    cpu: Times
    busy: float
    peak: float
    held_ratio: float
    calls: list[list[Call]]
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
    """The tensors within dicts, sequences, dataclasses and halos."""
    if isinstance(value, halo.Halos):
        value = vars(value)
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


def told(store: Store, snapshots: Iterable[int]) -> list[Told]:
    """What the other parts would tell each part of snapshots in halo mode, where they are not there to be asked."""
    found: list[Told] = [{} for _ in range(store.parts)]
    for snapshot in snapshots:
        wanted, x = [], []
        for part in range(store.parts):
            graph = store.read(snapshot, part, True)
            halos = halo.get(graph)
            assert halos is not None
            wanted.append([rows.numpy() for rows in halos.parts[0].recv_rows])
            x.append(graph.ndata["x"].numpy().copy())  # not a view, which would hold the whole part
        for part, own in enumerate(found):
            far = np.concatenate([x[r][rows] for r, rows in enumerate(wanted[part])])
            own[snapshot] = [rows[part] for rows in wanted], far
    return found


def _learn(graph: DGLGraph, heard: Told, snapshot: int) -> DGLGraph:
    """The sample, its halo linked, if it has one."""
    if (halos := halo.get(graph)) and not halos.parts[0].send_rows:
        given, far = heard[snapshot]
        halos.parts[0].complete(graph.ndata["x"], [torch.from_numpy(rows) for rows in given], torch.from_numpy(far))
    return graph


def rank(
    _: Comm, config: Config, number: int, size: int, batches: Sequence[Sequence[int]], threads: int, heard: Told
) -> Trial:
    """Try rank ``number`` of ``size`` on batches of snapshots, in passes as a run's epochs are: steps, then predictions."""
    import torch.utils.tensorboard  # rank 0 of a run loads it: memory

    torch.set_num_threads(threads)
    group = Lonely(number, size)
    device = trainer.resolve_device(config, number)
    samples = open_dataset(config, number, size)
    model = trainer.build_model(config, samples.widths, group).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.lr)
    prepare = getattr(model, "prepare", lambda graph: graph)
    clocks = time.perf_counter, time.thread_time
    seconds: dict[str, list[tuple[float, ...]]] = {"make": [], "batch": [], "finish": [], "forward": []}

    @contextlib.contextmanager
    def timed(what: str) -> Iterator[None]:
        started = [clock() for clock in clocks]
        yield
        devices.synchronize(device)
        seconds[what].append(tuple(clock() - then for clock, then in zip(clocks, started, strict=True)))

    def make(numbers: Sequence[int]) -> DGLGraph:
        with timed("make"):
            return prepare(halo.batch([_learn(samples[n], heard, n) for n in numbers]))

    def one_pass() -> None:
        model.train()
        calls.clear()
        for graph in prefetch(make, batches):
            group.at("forward")
            optimizer.zero_grad(set_to_none=True)
            with timed("batch"):
                loss, _ = trainer.compute_loss(config, model, graph, group, torch.Generator().manual_seed(0))
                group.at("backward")
                loss.backward()
            with timed("finish"):
                group.sum_gradients(model.parameters(), torch.zeros(3, device=device))  # as train.steps
                optimizer.step()
            calls.append(list(group.calls))
        model.eval()
        with torch.no_grad():
            for graph in prefetch(make, batches[:1]):
                with timed("forward"):
                    model(graph)

    calls: list[list[Call]] = []
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
    graphs = {n: samples[n] for numbers in batches for n in numbers}
    counted = sum(samples.size(n, graph) for n, graph in graphs.items())
    seconds["ready"] = seconds.pop("make")
    wall, cpu = (
        Times(**{what: statistics.median(one[k] for one in each) for what, each in seconds.items()}) for k in (0, 1)
    )
    plain = device.type == "cpu" and threads == 1  # else work is done elsewhere than in the thread that waits for it
    busy = sum(one[1] for one in seconds["batch"]) / sum(one[0] for one in seconds["batch"])
    peak = metrics.peak_memory_gb(device) * 1e9
    ratio = sum(map(held_bytes, graphs.values())) / max(counted, 1)
    took, each = [one[int(plain)] for one in seconds["batch"]], len(batches)
    fastest = statistics.mean(min(took[k::each]) for k in range(each))
    return Trial(wall, cpu if plain else wall, busy if plain else 1.0, peak, ratio, calls, fastest)


def exchange(
    group: Comm, ranks: Sequence[Sequence[Sequence[Call]]], between: float = 0.0, repeats: int = 10
) -> tuple[dict[str, float], float]:
    """Seconds that the calls of a step take this group, by phase, medians over the batches in turn; and the bytes of memory that
    being in a group costs a process. ranks: the calls of each, by batch; between: processor seconds that each process works from
    one call to the next, not counted: processes that come from work wait for one another longer than those that only call."""
    before = metrics.peak_memory_gb()
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    kinds, own = {4: torch.float32, 8: torch.float64}, ranks[group.rank]
    shared = max(group.size / resources.available_cores(), 1.0)  # that work takes so many times as long
    for turn in range(repeats + 1):
        for phase in PHASES:
            calls = [c for c in own[turn % len(own)] if c.phase == phase]
            tensors = [torch.zeros(c.payload // c.width, dtype=kinds[c.width]) for c in calls]
            group.max(0.0)  # all start together
            started, worked = time.perf_counter(), 0.0
            for c, tensor in zip(calls, tensors, strict=True):
                begun, until = time.perf_counter(), time.thread_time() + between
                while time.thread_time() < until:
                    pass
                worked += time.perf_counter() - begun
                if c.give:
                    group.all_to_all(tensor.view(-1, c.numbers), c.give, c.take)()
                else:
                    group.sum(tensor)
            passed = time.perf_counter() - started
            seconds[phase].append(max(passed - max(worked, between * len(calls) * shared), 0.0))
    grown = (metrics.peak_memory_gb() - before) * 1e9
    return {phase: statistics.median(each[1:]) for phase, each in seconds.items()}, grown
