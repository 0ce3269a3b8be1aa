"""A short trial of one rank: training steps on its own part of real snapshots, without the other ranks.

Each rank is tried in a process of its own, started as a rank of a run is, one rank after the other: memory and time are
those of training, even if the machine has fewer cores than the run has ranks. The group's calls are timed separately.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from ..distributed.call_counter import PHASES, Call, SimulatedRank
from ..distributed.comm import Comm
from ..ops import tiled_layer
from ..train import metrics, trainer
from ..utils import devices, resources

# snapshot → what the other parts send when halos are linked: rows to send to each, positions of halo nodes (Halo.complete)
HaloInputs = dict[int, tuple[list[np.ndarray], np.ndarray]]
Batches = Sequence[Sequence[int]]  # of snapshots

# Passes over the batches end after this processor time and this number of timed batches, or after MAX_PASSES. The peak
# memory of a graph without tiles grows over about twenty steps.
MIN_BATCHES, MIN_SECONDS, MAX_PASSES = 3, 8.0, 20
CALL_REPEATS = 10
CLOCKS = time.perf_counter, time.thread_time, time.process_time


@dataclass(frozen=True)
class Times:
    """Median seconds."""

    batch: float  # forward and backward pass of a batch
    forward: float  # forward pass of a batch without gradients
    finish: float  # sum of gradients and optimizer step
    fresh: float  # read a batch and prepare it
    ready: float  # prepare a batch whose samples are in memory


@dataclass(frozen=True)
class Trial:
    """Measurements of one rank."""

    wall: Times  # by the wall clock
    cpu: Times  # by the thread's processor clock, as on an idle machine; the same as wall unless on one CPU thread
    busy: float  # processor seconds per wall second
    peak: float  # largest memory of the process in bytes, with the tried samples
    held_ratio: float  # bytes that a sample occupies per byte that the dataset counts for it
    calls: list[list[Call]]  # of one step on each batch
    fastest: float  # processor seconds of a batch, the mean over batches of the minimum
    cores: float = 1.0  # that a batch uses


def graph_bytes(graph: DGLGraph) -> int:
    """Bytes that a graph occupies: its fields, its sparse formats as far as they exist, its tiles and halos."""
    total = sum(frame[name].nbytes for frame in (graph.ndata, graph.edata) for name in frame)
    formats = graph.formats()["created"]
    n, e = graph.num_nodes(), graph.num_edges()
    width = 4 if graph.idtype == torch.int32 else 8
    total += width * (2 * e * ("coo" in formats) + (n + 2 * e) * sum(name in formats for name in ("csc", "csr")))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(graph.__dict__)}
    return total + sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, sequences, dataclasses and halos."""
    if isinstance(value, halo.Halos) or is_dataclass(value):
        value = vars(value)
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def halo_inputs(store: Store, snapshots: Iterable[int]) -> list[HaloInputs]:
    """What the ranks of a run send each other to link the halos of snapshots, for each part."""
    inputs: list[HaloInputs] = [{} for _ in range(store.parts)]
    for snapshot in snapshots:
        recv_rows, x = [], []
        for part in range(store.parts):
            graph = store.read(snapshot, part, True)
            halos = halo.get(graph)
            assert halos is not None
            recv_rows.append([rows.numpy() for rows in halos.parts[0].recv_rows])
            x.append(graph.ndata["x"].numpy().copy())  # a view would keep the whole part in memory
        for part, own in enumerate(inputs):
            halo_x = np.concatenate([x[r][rows] for r, rows in enumerate(recv_rows[part])])
            own[snapshot] = [rows[part] for rows in recv_rows], halo_x
    return inputs


class _Stopwatch:
    """Wall seconds, and processor seconds of the calling thread and of the process, for each run of a named block."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, defaultdict[str, list[tuple[float, ...]]](list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = [clock() for clock in CLOCKS]
        yield
        devices.synchronize(self._device)
        self.seconds[name].append(tuple(clock() - start for clock, start in zip(CLOCKS, started, strict=True)))


def try_rank(
    _: Comm, config: Config, rank: int, size: int, batches: Batches, halos: HaloInputs, min_seconds: float = MIN_SECONDS
) -> Trial:
    """Train rank ``rank`` of ``size`` on batches of snapshots; after each pass over them it also predicts the first one."""
    import torch.utils.tensorboard  # as rank 0 of a run: it takes memory

    group = SimulatedRank(rank, size)
    device = trainer.resolve_device(config, rank)
    samples = open_dataset(config, rank, size)
    config = samples.complete(config)
    model = trainer.build_model(config, samples.widths, group, samples.statistics()).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.lr)
    prepare = getattr(model, "prepare", lambda graph: graph)
    watch = _Stopwatch(device)
    calls: list[list[Call]] = []

    def load(snapshots: Sequence[int]) -> DGLGraph:
        with watch("ready"):
            graphs = [samples[n] for n in snapshots]
            for n, graph in zip(snapshots, graphs, strict=True):
                if (own := halo.get(graph)) and not own.parts[0].send_rows:
                    rows, halo_x = halos[n]
                    own.parts[0].complete(graph.ndata["x"], [*map(torch.from_numpy, rows)], torch.from_numpy(halo_x))
            return prepare(halo.batch(graphs))

    def run_pass() -> None:
        model.train()
        calls.clear()
        for graph in prefetch(load, batches):
            group.counter.enter("forward")
            optimizer.zero_grad(set_to_none=True)
            with watch("batch"):
                loss, _ = trainer.compute_loss(config, model, graph, group, torch.Generator().manual_seed(0))
                group.counter.enter("backward")
                loss.backward()
            with watch("finish"):
                group.sum_gradients(model.parameters(), torch.zeros(3, device=device))  # as in Trainer.steps
                optimizer.step()
            calls.append(list(group.counter.calls))
        model.eval()
        with torch.no_grad():
            for graph in prefetch(load, batches[:1]):
                with watch("forward"):
                    model(graph)

    with tiled_layer.tile_threads(config.train.threads):
        run_pass()  # reads the samples
        first, watch.seconds = watch.seconds, defaultdict(list)
        watch.seconds["fresh"] = first["ready"][: len(batches)]
        started = time.process_time()
        for _pass in range(MAX_PASSES):
            run_pass()
            if len(watch.seconds["batch"]) >= MIN_BATCHES and time.process_time() - started > min_seconds:
                break
    graphs = {n: samples[n] for snapshots in batches for n in snapshots}
    counted = sum(samples.size(n, graph) for n, graph in graphs.items())
    threads = config.train.threads
    one_thread = device.type == "cpu" and threads == 1  # otherwise other threads or the device do the work
    wall, cpu, of_process = zip(*watch.seconds["batch"], strict=True)
    seconds = cpu if one_thread else wall
    medians = {f.name: np.median(watch.seconds[f.name], 0).tolist() for f in fields(Times)}  # of wall and processor
    return Trial(
        wall=Times(**{name: clocks[0] for name, clocks in medians.items()}),
        cpu=Times(**{name: clocks[one_thread] for name, clocks in medians.items()}),
        busy=sum(cpu) / sum(wall) if one_thread else 1.0,
        peak=metrics.peak_memory_gb(device) * 1e9,
        held_ratio=sum(map(graph_bytes, graphs.values())) / max(counted, 1),
        calls=calls,
        fastest=statistics.mean(min(seconds[k :: len(batches)]) for k in range(len(batches))),
        cores=1.0 if one_thread else min(max(sum(of_process) / sum(wall), 1.0), threads),
    )


def time_calls(group: Comm, ranks: list[list[list[Call]]], work_s: float) -> tuple[dict[str, float], float]:
    """Median seconds of this rank's calls of a step, by phase, and the bytes of memory that the group costs it.

    ranks: the calls of each rank, by batch. work_s: processor seconds that each rank works before each call, which are
    subtracted: ranks that come from work wait longer for each other.
    """
    memory_before = metrics.peak_memory_gb()
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    dtypes, own = {4: torch.float32, 8: torch.float64}, ranks[group.rank]
    slowdown = max(group.size / resources.available_cores(), 1.0)  # of work, where ranks share cores
    for turn in range(CALL_REPEATS + 1):
        for phase in PHASES:
            calls = [c for c in own[turn % len(own)] if c.phase == phase]
            tensors = [torch.zeros(c.payload // c.width, dtype=dtypes[c.width]) for c in calls]
            group.max(0.0)  # all ranks start together
            started, worked = time.perf_counter(), 0.0
            for c, tensor in zip(calls, tensors, strict=True):
                work_started, until = time.perf_counter(), time.thread_time() + work_s
                while time.thread_time() < until:
                    pass
                worked += time.perf_counter() - work_started
                if c.send_counts:
                    group.all_to_all(tensor.view(-1, c.numbers), c.send_counts, c.receive_counts)()
                else:
                    group.sum(tensor)
            passed = time.perf_counter() - started
            seconds[phase].append(max(passed - max(worked, work_s * len(calls) * slowdown), 0.0))
    memory = (metrics.peak_memory_gb() - memory_before) * 1e9
    return {phase: statistics.median(turns[1:]) for phase, turns in seconds.items()}, memory
