"""`distegnn plan`: what a training run will take, from a short trial of every rank on real snapshots, before the run.

Legend: S snapshots of a split, P parts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import Config
from ..data import dataset
from ..data.store import Store
from ..distributed import spawn
from ..errors import Failure
from ..models import network
from ..ops import tiling
from ..train import preflight, trainer
from ..utils import memory, resources
from . import trial, trial_data
from .trial import PHASES, Call, Times, Trial
from .trial_data import TRIED, Say, Source

# Batches that a rank is tried on: at most; as many as have so many edges + 4 nodes together, but TRIED at least.
MOST, ROWS = 10, 1_000_000
ALIKE = 1.1  # the fastest device over the slowest: below, the difference is the trial's own noise


@dataclass(frozen=True)
class Rank:
    """One process of the run, means over snapshots. edges: those that it computes on; cut: in-edges from other processes' nodes,
    dropped in bridge mode, among ``edges`` in halo mode; halo: those nodes. sent_bytes: what it sends in a step. peak_gb:
    largest resident memory of the process (device: of the device), in 10⁹ bytes; alone_s: its own work of a step, alone on this
    machine; cpu_s: the same by the processor's clock; speed: edges + 4 nodes of its batches, forward and backward, in a second
    of that clock at its best."""

    rank: int
    nodes: float
    edges: float
    cut: float
    halo: float
    sent_bytes: float
    peak_gb: float
    alone_s: float
    cpu_s: float
    speed: float


@dataclass(frozen=True)
class Plan:
    """What a run will take. halo: the mode, bridge or exchange. calls: sums over the group in one step, and exchanges of halo
    rows; payload_bytes: what a rank hands to them, wire_bytes: what it sends, of the rank that sends most. exchange_s: their time
    in a step. epoch_s: an epoch with its
    validation, samples in memory as far as they fit; first_epoch_s: the first, which reads all of them; idle_…: the same by the
    processor's clock: what an idle machine would take; busy: the share of a core that the trials got. partition_s: writing the
    store first, from a trajectories file. memory_gb: of all ranks together."""

    data: str
    parts: int
    halo: str
    snapshots: dict[str, int]
    ranks: list[Rank]
    steps: int
    calls: int
    payload_bytes: float
    wire_bytes: float
    exchange_s: float
    step_s: float
    epoch_s: float
    first_epoch_s: float
    idle_step_s: float
    idle_epoch_s: float
    busy: float
    epochs: int
    partition_s: float
    memory_gb: float
    free_gb: float
    cores: float

    @property
    def weights(self) -> list[float] | None:
        """Shares of the nodes with which all devices are done at once, the slowest being 1; None where they are alike."""
        slowest = min(rank.speed for rank in self.ranks)
        found = [round(rank.speed / slowest, 2) for rank in self.ranks]
        return None if max(found) < ALIKE else found

    def plain(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return asdict(self) | {"weights": self.weights}


def _rows(counts: np.ndarray) -> np.ndarray:
    """What time goes with: edges, and nodes at the tiles' rate."""
    return tiling.EDGES_PER_NODE * counts[..., 0] + counts[..., 1]


def _picked(source: Source, size: int) -> list[list[int]]:
    """Batches of places in ``source.numbers``, the largest snapshot among them, the others spread over all (and over shards).

    More of small graphs: the peak of those that run whole grows with the variety of their sizes."""
    count = len(source.numbers)
    size = min(size, count)
    rows = _rows(source.tried).max(1)  # of the slowest rank
    tried = int(np.clip(ROWS // (size * rows.mean()), TRIED, MOST))
    spread = np.linspace(0, count - 1, min(tried * size, count)).round().astype(int).tolist()
    places = list(dict.fromkeys([int(rows.argmax()), *spread]))
    return [places[k : k + size] for k in range(0, len(places) - size + 1, size)][:tried]


def _counted(counts: np.ndarray, config: Config) -> np.ndarray:
    """What the ranks' samples together are counted as, in bytes (P,): in halo mode all as the largest part."""
    if config.partition.halo == "exchange":
        counts = np.broadcast_to(counts.max(1, keepdims=True), counts.shape)
    return (counts * [dataset.cached_bytes(1, 0), dataset.cached_bytes(0, 1)]).sum((0, 2))


def _between(trials: list[Trial]) -> float:
    """Seconds of work between two calls of a step, up to where longer ones change little of what a call costs."""
    return min(0.01, max(trial.cpu.batch / max(map(len, trial.calls)) for trial in trials))


def _held(source: Source, picked: list[int], trials: list[Trial], group: float) -> list[float]:
    """Bytes of each rank's process at its largest: the trial's, the group's, the samples that a run keeps beside those tried."""
    tried = _counted(source.tried[picked], source.config)
    whole = sum(_counted(counts, source.config) for counts in source.counts.values())
    kept = np.minimum(whole, np.maximum(dataset.CACHE_BYTES // len(trials), tried))
    return [
        trial.peak + group + more * trial.held_ratio
        for trial, more in zip(trials, (kept - tried).clip(0).tolist(), strict=True)
    ]


def make(config: Config, say: Say = lambda line: None) -> Plan:
    """Try every rank of a config's run and say what the run will take.

    Raises Failure for data or a model that `train` would refuse, and where a rank's step alone exceeds the memory there is.
    """
    network.model_class(config.model.name)
    device = trainer.resolve_device(config)
    parts = dataset.part_count(config)
    if config.train.replicas > 1:
        raise Failure(
            f"train.replicas={config.train.replicas}: a plan knows one group of processes; plan with train.replicas=1: so "
            "many groups take so many times its memory and cores, and share the batches of a step"
        )
    exchange = config.partition.halo == "exchange" and parts > 1
    preflight.check_training(config, parts)
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        source = trial_data.of(config, parts, Path(folder), say)
        batches = _picked(source, config.train.batch_size)
        numbers = [[source.numbers[k] for k in batch] for batch in batches]
        # alone, a run stays in the command's own process, with the threads that this one has
        start, threads = ("spawn", torch.get_num_threads()) if parts == 1 else ("forkserver", 1)
        heard: list[trial.Told] = [{}] * parts
        if exchange:
            heard = trial.told(Store(source.config.data.path), sorted({n for batch in numbers for n in batch}))
        trials: list[Trial] = []
        for p in range(parts):
            trials += spawn.run_ranks(
                trial.rank, 1, source.config, p, parts, numbers, threads, heard[p], start_method=start
            )
            say(f"rank {p}: {trials[-1].wall.batch:.3f} s a batch, {trials[-1].peak / 1e9:.2f} GB")
        found = [(dict.fromkeys(PHASES, 0.0), 0.0)]
        if parts > 1:
            found = spawn.run_ranks(trial.exchange, parts, [trial.calls for trial in trials], _between(trials))
    sums = {phase: max(seconds[phase] for seconds, _ in found) for phase in PHASES}
    picked = [k for batch in batches for k in batch]
    peaks = [trial.peak for trial in trials]
    if device.type == "cpu":  # samples and sums stay on the CPU
        peaks = _held(source, picked, trials, max(grown for _, grown in found))
    return _summed(config, source, picked, trials, sums, peaks)


class _Clock:
    """Seconds of a step and an epoch by one of the trials' clocks."""

    def __init__(self, config: Config, source: Source, picked: list[int], times: list[Times], sums: dict[str, float]):
        tried = _rows(source.tried[picked]).mean(0)  # (P,)
        self.times, self.sums, self.cores = times, sums, resources.available_cores()
        self.scale = {name: (_rows(c).mean(0) / tried).tolist() for name, c in source.counts.items()}
        self.batches = {name: -(-len(c) // config.train.batch_size) for name, c in source.counts.items()}
        self.steps = -(-self.batches["train"] // config.train.accumulate)
        self.finish = self._wall([t.finish for t in times], [0.0]) + sums["gradients"]

    def _wall(self, work: Sequence[float], beside: Sequence[float]) -> float:
        """Seconds until the last of P processes is done, each with ``work`` and a thread beside it, on the cores there are."""
        return max(*work, *beside, (sum(work) + sum(beside)) / self.cores)

    def batch(self, split: str, fresh: bool) -> float:
        """Seconds of one batch, the next one being read (fresh) or fetched from memory beside."""
        factors = list(zip(self.times, self.scale[split], strict=True))
        work = [(t.batch if split == "train" else t.forward) * f for t, f in factors]
        sent = self.sums["forward"] + (self.sums["backward"] if split == "train" else 0.0)
        return self._wall(work, [(t.fresh if fresh else t.ready) * f for t, f in factors]) + sent

    def step(self, fresh: bool) -> float:
        return self.batch("train", fresh) * self.batches["train"] / self.steps + self.finish

    def epoch(self, fresh: bool) -> float:
        """Seconds of an epoch and its validation."""
        return self.steps * self.step(fresh) + self.batches["valid"] * self.batch("valid", fresh)

    def alone(self, rank: int) -> float:
        """Seconds of a rank's own work of a step."""
        t, batches = self.times[rank], self.batches["train"] / self.steps
        return t.batch * self.scale["train"][rank] * batches + t.finish


def _of_step(calls: list[list[Call]], each: int, parts: int) -> tuple[int, float, float]:
    """Calls of a step of ``each`` batches, bytes that the rank hands to them, bytes that it sends: means over the batches tried."""
    taken = [(1 if c.phase == "gradients" else each, c) for batch in calls for c in batch]
    payload = sum(times * c.payload for times, c in taken)
    wire = sum(times * c.sent(parts) for times, c in taken)
    return sum(times for times, _ in taken) // len(calls), payload / len(calls), wire / len(calls)


def _summed(
    config: Config, source: Source, picked: list[int], trials: list[Trial], sums: dict[str, float], peaks: list[float]
) -> Plan:
    """The plan, from what every rank and the group showed."""
    parts = len(trials)
    now = _Clock(config, source, picked, [t.wall for t in trials], sums)
    idle = _Clock(config, source, picked, [t.cpu for t in trials], sums)
    counted = sum(float(_counted(counts, config).sum()) for counts in source.counts.values())
    fresh = counted > dataset.CACHE_BYTES  # not all can stay in memory
    mean, own = source.table.mean(0), source.counts["train"].mean(0)
    size = min(config.train.batch_size, len(source.numbers))
    tried = size * _rows(source.tried[picked]).mean(0)  # edges + 4 nodes of a batch (P,)
    speeds = (tried / [trial.fastest for trial in trials]).tolist()
    each = min(config.train.accumulate, now.batches["train"])  # batches of a step
    taken = [_of_step(trial.calls, each, parts) for trial in trials]
    sent = [wire for _, _, wire in taken]
    columns = zip(*own.T.tolist(), *mean[:, 2:].T.tolist(), sent, peaks, speeds, strict=True)
    return Plan(
        data=config.data.path,
        parts=parts,
        halo=config.partition.halo,
        snapshots={name: len(c) for name, c in source.counts.items()},
        ranks=[
            Rank(p, n, e, cut, halo, wire, held / 1e9, now.alone(p), idle.alone(p), speed)
            for p, (n, e, cut, halo, wire, held, speed) in enumerate(columns)
        ],
        steps=now.steps,
        calls=taken[0][0],
        payload_bytes=max(payload for _, payload, _ in taken),
        wire_bytes=max(sent),
        exchange_s=each * (sums["forward"] + sums["backward"]) + sums["gradients"],
        step_s=now.step(fresh),
        epoch_s=now.epoch(fresh),
        first_epoch_s=now.epoch(True),
        idle_step_s=idle.step(fresh),
        idle_epoch_s=idle.epoch(fresh),
        busy=float(np.mean([t.busy for t in trials])),
        epochs=config.train.epochs,
        partition_s=source.partition_s,
        memory_gb=sum(peaks) / 1e9,
        free_gb=memory.available_memory("cpu") / 1e9,
        cores=now.cores,
    )
