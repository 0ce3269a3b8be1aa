"""`distegnn plan`: estimate memory, communication and time of a training run from a short trial of each rank."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import Config
from ..data import dataset
from ..data.store import open_store
from ..distributed import spawn
from ..distributed.call_counter import PHASES, Call
from ..errors import Failure
from ..models import network
from ..ops import tiling
from ..train import preflight, trainer
from ..utils import memory, resources
from . import trial, trial_data
from .trial import Times, Trial
from .trial_data import MIN_BATCHES, Say, Source

MAX_BATCHES, MAX_ROWS = 10, 1_000_000  # that each rank is tried on, see pick_batches
SIMILAR_SPEED = 1.1  # largest ratio of two devices' speeds that may be noise of the trial


@dataclass(frozen=True)
class Rank:
    """One process of the run, means over snapshots."""

    rank: int
    nodes: float
    edges: float  # that it computes on
    cut: float  # in-edges from nodes of other ranks; halo mode has them among ``edges``, bridge mode drops them
    halo: float  # those nodes
    sent_bytes: float  # per step
    peak_gb: float  # largest resident memory of the process, or of the device, in 10⁹ bytes
    alone_s: float  # its own work in a step by the wall clock
    cpu_s: float  # the same by the processor's clock
    speed: float  # edges + 4 nodes, forward and backward, per second of its fastest batches


@dataclass(frozen=True)
class Plan:
    """Estimates for a run. idle_…: by the processor's clock, as on an otherwise idle machine."""

    data: str
    parts: int
    halo: str  # bridge or exchange
    snapshots: dict[str, int]  # by split
    ranks: list[Rank]
    steps: int
    calls: int  # all-reduces and halo exchanges of a step
    payload_bytes: float  # that the rank with most passes to them
    wire_bytes: float  # that the rank with most sends
    exchange_s: float  # their time in a step
    step_s: float
    epoch_s: float  # with validation; samples are in memory as far as they fit
    first_epoch_s: float  # which reads all samples
    idle_step_s: float
    idle_epoch_s: float
    busy: float  # share of a core that the trials got
    epochs: int
    partition_s: float  # to write the store; 0 if it exists
    memory_gb: float  # of all ranks of the machine that needs most
    free_gb: float
    cores: float  # of a machine
    machines: int  # that the store was made for, each with its share of the ranks
    weights: list[float] | None  # with which all devices finish together, 1 for the slowest; None: speeds are similar


def _rows(counts: np.ndarray) -> np.ndarray:
    """The number that time is proportional to: edges, and nodes by their cost. counts: nodes and edges (…, 2)."""
    return tiling.EDGES_PER_NODE * counts[..., 0] + counts[..., 1]


def pick_batches(source: Source, size: int) -> list[list[int]]:
    """Batches of indices into ``source.snapshots``: the largest and others spread over all; more of small graphs."""
    count, rows = len(source.snapshots), _rows(source.tried).max(1)  # of the slowest rank
    size = min(size, count)
    batches = int(np.clip(MAX_ROWS // (size * rows.mean()), MIN_BATCHES, MAX_BATCHES))
    spread = np.linspace(0, count - 1, min(batches * size, count)).round().astype(int).tolist()
    indices = list(dict.fromkeys([int(rows.argmax()), *spread]))
    return [indices[k : k + size] for k in range(0, len(indices) - size + 1, size)][:batches]


def cached_bytes(counts: np.ndarray, config: Config) -> np.ndarray:
    """Bytes that the dataset counts for each rank's samples (P,); in halo mode every part counts as the largest."""
    if config.partition.halo == "exchange":
        counts = np.broadcast_to(counts.max(1, keepdims=True), counts.shape)
    return (counts * [dataset.cached_bytes(1, 0), dataset.cached_bytes(0, 1)]).sum((0, 2))


def work_between_calls(trials: list[Trial]) -> float:
    """Seconds of work between two calls of a step; longer ones than 10 ms hardly change the time of a call."""
    return min(0.01, max(trial.cpu.batch / max(map(len, trial.calls)) for trial in trials))


def peak_bytes(source: Source, trials: list[Trial], group: float) -> list[float]:
    """Peak memory of each rank's process: the trial's, the group's, and the samples that only a whole run caches."""
    tried = cached_bytes(source.tried, source.config)
    total = sum(cached_bytes(counts, source.config) for counts in source.counts.values())
    more = (np.minimum(total, dataset.CACHE_BYTES // len(trials)) - tried).clip(0).tolist()
    return [t.peak + group + extra * t.held_ratio for t, extra in zip(trials, more, strict=True)]


def make_plan(config: Config, say: Say = lambda line: None) -> Plan:
    """Try every rank of a config's run and estimate what the run takes. Raises Failure where `train` would refuse."""
    network.model_class(config.model.name)
    device = trainer.resolve_device(config)
    parts = dataset.part_count(config)
    if config.train.replicas > 1:
        raise Failure("train.replicas: plan with 1; N groups take N times its memory and cores and share its batches")
    preflight.check_training(config, parts)
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        say(f"{config.data.path}: reading the sizes of the snapshots")
        source = trial_data.open_source(config, parts, Path(folder), say)
        batches = pick_batches(source, config.train.batch_size)
        snapshots = [[source.snapshots[index] for index in batch] for batch in batches]
        picked = [index for batch in batches for index in batch]
        source = replace(source, snapshots=[source.snapshots[k] for k in picked], tried=source.tried[picked])
        inputs: list[trial.HaloInputs] = [{}] * parts
        if config.partition.halo == "exchange" and parts > 1:
            inputs = trial.halo_inputs(open_store(source.config.data.path), sorted(source.snapshots))
        method = "spawn" if parts == 1 else "forkserver"  # a run of one process stays in the command's process
        trials: list[Trial] = []
        for rank in range(parts):
            say(f"rank {rank} of {parts}: a trial of about ten seconds")
            arguments = source.config, rank, parts, snapshots, inputs[rank], trial.MIN_SECONDS
            trials += spawn.run_ranks(trial.try_rank, 1, *arguments, start_method=method)
            say(f"rank {rank}: {trials[-1].wall.batch:.3f} s a batch, {trials[-1].peak / 1e9:.2f} GB")
        timings = [(dict.fromkeys(PHASES, 0.0), 0.0)]
        if parts > 1:
            timings = spawn.run_ranks(trial.time_calls, parts, [t.calls for t in trials], work_between_calls(trials))
    call_s = {phase: max(seconds[phase] for seconds, _ in timings) for phase in PHASES}
    peaks = [trial.peak for trial in trials]
    if device.type == "cpu":  # samples and calls stay on the CPU
        peaks = peak_bytes(source, trials, max(group for _, group in timings))
    return combine(config, source, trials, call_s, peaks)


def largest_sum(values: Sequence[float] | np.ndarray, machines: int) -> float:
    """The largest of the machines' sums over their ranks; rank r of P is on machine r // (P / machines)."""
    return float(np.reshape(values, (machines, -1)).sum(1).max())


class TimeEstimate:
    """Seconds of a step and of an epoch with validation, by one of the trials' clocks.

    call_s: of a batch, by phase; used: cores that a process uses.
    """

    def __init__(
        self, config: Config, source: Source, times: list[Times], call_s: dict[str, float], used: float = 1.0
    ) -> None:
        tried = _rows(source.tried).mean(0)  # (P,)
        self.times, self.call_s, self.used, self.cores = times, call_s, used, resources.available_cores()
        self.scale = {name: (_rows(c).mean(0) / tried).tolist() for name, c in source.counts.items()}
        self.batches = {name: -(-len(c) // config.train.batch_size) for name, c in source.counts.items()}
        self.machines = source.machines
        self.steps = -(-self.batches["train"] // config.train.accumulate)
        self.finish = self._slowest([t.finish for t in times], [0.0]) + call_s["gradients"]

    def _slowest(self, work: Sequence[float], loading: Sequence[float]) -> float:
        """Seconds until all of P processes have done ``work``, each with a thread that loads, on each machine's cores."""
        busy = self.used * np.asarray(work) + np.asarray(loading)
        return max(*work, *loading, largest_sum(np.broadcast_to(busy, len(self.times)), self.machines) / self.cores)

    def batch(self, split: str, fresh: bool) -> float:
        """Seconds of a batch while the next one is read from disk (fresh) or prepared from memory."""
        ranks = list(zip(self.times, self.scale[split], strict=True))
        work = [(t.batch if split == "train" else t.forward) * scale for t, scale in ranks]
        loading = [(t.fresh if fresh else t.ready) * scale for t, scale in ranks]
        calls = self.call_s["forward"] + (self.call_s["backward"] if split == "train" else 0.0)
        return self._slowest(work, loading) + calls

    def step(self, fresh: bool) -> float:
        return self.batch("train", fresh) * self.batches["train"] / self.steps + self.finish

    def epoch(self, fresh: bool) -> float:
        return self.steps * self.step(fresh) + self.batches["valid"] * self.batch("valid", fresh)

    def alone(self, rank: int) -> float:  # its own work in a step
        t, batches = self.times[rank], self.batches["train"] / self.steps
        return t.batch * self.scale["train"][rank] * batches + t.finish


def step_communication(calls: list[list[Call]], batches: int, parts: int) -> tuple[int, float, float]:
    """Number of calls, payload and bytes sent of a step of so many batches; means over the batches of ``calls``."""
    repeated = [(1 if c.phase == "gradients" else batches, c) for batch in calls for c in batch]
    payload = sum(times * c.payload for times, c in repeated)
    sent = sum(times * c.sent(parts) for times, c in repeated)
    return sum(times for times, _ in repeated) // len(calls), payload / len(calls), sent / len(calls)


def combine(config: Config, source: Source, trials: list[Trial], call_s: dict[str, float], peaks: list[float]) -> Plan:
    """The plan from the trials of all ranks and the timing of the group's calls."""
    parts = len(trials)
    used = max(t.cores for t in trials)
    now = TimeEstimate(config, source, [t.wall for t in trials], call_s, used)
    idle = TimeEstimate(config, source, [t.cpu for t in trials], call_s, used)
    total = sum(float(cached_bytes(counts, config).sum()) for counts in source.counts.values())
    fresh = total > dataset.CACHE_BYTES  # not all samples can stay in memory
    batch_rows = min(config.train.batch_size, len(source.snapshots)) * _rows(source.tried).mean(0)  # (P,)
    speeds = (batch_rows / [trial.fastest for trial in trials]).tolist()
    weights = [round(speed / min(speeds), 2) for speed in speeds]
    batches = min(config.train.accumulate, now.batches["train"])  # of a step
    communication = [step_communication(trial.calls, batches, parts) for trial in trials]
    sent = [wire for _, _, wire in communication]
    sizes = np.hstack([source.counts["train"].mean(0), source.table.mean(0)[:, 2:]]).tolist()  # (P, 4)
    return Plan(
        data=config.data.path,
        parts=parts,
        halo=config.partition.halo,
        snapshots={name: len(c) for name, c in source.counts.items()},
        ranks=[
            Rank(p, nodes, edges, cut, halo, sent[p], peaks[p] / 1e9, now.alone(p), idle.alone(p), speeds[p])
            for p, (nodes, edges, cut, halo) in enumerate(sizes)
        ],
        steps=now.steps,
        calls=communication[0][0],
        payload_bytes=max(payload for _, payload, _ in communication),
        wire_bytes=max(sent),
        exchange_s=batches * (call_s["forward"] + call_s["backward"]) + call_s["gradients"],
        step_s=now.step(fresh),
        epoch_s=now.epoch(fresh),
        first_epoch_s=now.epoch(True),
        idle_step_s=idle.step(fresh),
        idle_epoch_s=idle.epoch(fresh),
        busy=float(np.mean([t.busy for t in trials])),
        epochs=config.train.epochs,
        partition_s=source.partition_s,
        memory_gb=largest_sum(peaks, source.machines) / 1e9,
        free_gb=memory.available_memory("cpu") / 1e9,
        cores=now.cores,
        machines=source.machines,
        weights=weights if max(weights) >= SIMILAR_SPEED else None,
    )
