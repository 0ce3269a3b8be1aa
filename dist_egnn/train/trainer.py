"""Training and evaluation; every process of a run executes these functions on its own partitions."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from dgl import DGLGraph
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ..config import Config, Model
from ..data import halo
from ..data.dataset import Dataset, open_dataset, prefetch
from ..data.identity import Identity
from ..distributed.comm import Comm
from ..errors import Failure
from ..models import network, resolve, simulator
from ..ops import activation_offload, message_passing, tiled_layer
from ..ops.native import engine as native_engine
from ..ops.native import library as native_library
from ..utils import devices, filesystem, signals
from ..utils.progress import progress_bar
from . import augmentation, callbacks, checkpoint, diagnostics, initial_weights, input_scale, losses, metrics
from .run_writer import RunWriter, Shown
from .state import TrainingState
from .weight_average import WeightAverage

# the error of train.select=rollout (evaluate/selection.py), from the group, the config, the model and its features
RolloutError = Callable[[Comm, Config, Module, Sequence[str]], float]
_drawing = threading.Lock()  # torch's generator belongs to all threads


def resolve_device(config: Config, rank: int = 0, processes: int = 1) -> torch.device:
    """The device of a rank's parameters. Raises Failure if it does not exist, if model.engine does not support it, and
    for train.backend=nccl without a device for each of the processes."""
    device = devices.resolve(config.train.device, rank)
    if config.train.backend == "nccl":
        devices.check_nccl(config.train.device, device, processes)
    m = config.model
    obstacle = native_engine.obstacle(m.hidden, torch.float32, device, m.precision != "float32")
    message_passing.resolve_engine(m.engine, device, obstacle)
    if rank == 0 and m.engine == "auto" and native_library.load() == native_library.STALE:
        print(
            f"warning: the native kernels are {native_library.STALE}; models run on the torch engine", file=sys.stderr
        )
    return device


def join_device(world: Comm, config: Config) -> torch.device:
    """`resolve_device`, after which ``world`` sends the device's tensors as train.backend says. Collective."""
    device = resolve_device(config, world.rank)
    world.use_device(device, config.train.backend)
    return device


def build_model(
    config: Config, widths: tuple[int, int], comm: Comm, statistics: tuple[float, float, float] | None = None
) -> Module:
    """The model for widths (F, K) of features and node attributes, on the CPU; all ranks draw the same weights.

    statistics: of a simulator's training split (`Dataset.statistics`); None if a checkpoint will be loaded.
    """
    kind, options = resolve.resolve_model(asdict(config.model), asdict(Model()), config.data.radius)
    exchange = config.partition.halo == "exchange" and comm.size > 1
    if exchange and not issubclass(kind, (network.Linear, network.Network)):
        needed = "partition.halo=exchange needs a subclass of Network"
        raise Failure(f"model.name={config.model.name}: {needed}; set partition.halo=bridge")
    make: Callable[..., Module] = kind
    if config.data.history:
        if not issubclass(kind, network.Network):
            raise Failure(
                f"model.name={config.model.name}: a simulator needs a subclass of Network; set data.history=0"
            )
        d = config.data
        options |= {"history": d.history, "walls": d.walls != "none", "radius": d.radius}
        options |= {"by_radius": d.edges == "radius"}
        options |= {"predicts": config.model.predicts, "statistics": statistics}
        make = partial(simulator.Simulator, kind)
    with _drawing:
        torch.manual_seed(config.train.seed)
        model = make(features=widths[0], node_attributes=widths[1], **options)
    model.comm = comm  # type: ignore[assignment]
    if isinstance(network_of(model), network.Network):
        network_of(model).requires_halo = exchange  # type: ignore[assignment]
    return model


def network_of(model: Module) -> Module:
    """The model, or the backbone of a simulator."""
    return model.backbone if isinstance(model, simulator.Simulator) else model


def compute_loss(
    config: Config, model: Module, graph: DGLGraph, comm: Comm, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """This rank's shares of the loss and of the MSE of a batch: their sums over ranks are those of the whole graphs."""
    with activation_offload.offload_to_disk(config.train.kept, [graph.edata[name] for name in graph.edata]):
        predicted, z = model(graph)
    total, _ = network.graph_size_and_centroid(graph, graph.ndata["x"].to(predicted), comm)
    if "moving" in graph.ndata:
        counts = graph.batch_num_nodes()
        total = graph.ndata["moving"][counts.cumsum(0) - counts].to(total).unsqueeze(1)
    moving = losses.moving_nodes(graph)
    mse = losses.squared_error(predicted[moving], graph.ndata["y"][moving].to(predicted), total)
    loss = mse / model.unit**2 if isinstance(model, simulator.Simulator) else mse
    if not (config.loss.mmd and z.shape[1]):
        return loss, mse.detach()
    return loss + config.loss.mmd * losses.mmd(z, graph, total, config.loss, generator), mse.detach()


def _chunks(items: Sequence[int], size: int) -> list[list[int]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def _own(items: list[Any], comm: Comm) -> list[Any]:
    """The items (batches of a step or samples of a split) of this process's group: k, k + K, … of K groups"""
    return items[comm.world.rank // comm.size :: comm.world.size // comm.size]


def prepared_batches(model: Module, samples: Dataset, batches: list[list[int]]) -> Generator[DGLGraph, None, None]:
    """The batches in order; a thread reads and tiles the next one while one is in use."""

    def make(numbers: list[int]) -> DGLGraph:
        graph = halo.batch([samples[n] for n in numbers])
        return model.prepare(graph) if isinstance(model, (network.Network, simulator.Simulator)) else graph

    return prefetch(make, batches)


def _seeded(*seed: int) -> torch.Generator:
    """A generator seeded by these numbers alone (seed, epoch, batch), so that all ranks and a resumed run agree."""
    mixed = reduce(lambda mixed, part: (mixed * 1_000_003 + part + 1) % (2**63 - 1), seed, 0)
    return torch.Generator(device="cpu").manual_seed(mixed)


def evaluate_split(
    model: Module, samples: Dataset, split: str, config: Config, comm: Comm, shown: Shown | None = None
) -> float:
    """The model's MSE over all samples of a split; fills ``shown``."""
    model.eval()
    batches = _own(_chunks(samples.splits[split], config.train.batch_size), comm)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for graph in prepared_batches(model, samples, batches):
            predicted, z = model(graph)
            if shown is not None:
                shown.virtual.append(z.flatten(0, 1).cpu())
                if shown.nodes is None:
                    shown.nodes = graph.ndata["x"].to(predicted), predicted, graph.ndata["y"].to(predicted)
            moving = losses.moving_nodes(graph)
            yield predicted[moving], graph.ndata["y"][moving]

    with torch.no_grad():
        return metrics.mean_squared_error(pairs(), comm.world)


def clip_gradients(model: Module, max_norm: float) -> float:
    """Clip the gradient's norm (0: do not clip); returns the norm before. NaN, and no clipping, if it is not finite."""
    try:  # clipping by infinity only measures
        return float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf, error_if_nonfinite=True))
    except RuntimeError:
        return math.nan


@dataclass
class Trainer:
    """A training on one process of the group ``comm``, from ``state`` on."""

    comm: Comm
    config: Config
    model: Module
    optimizer: Optimizer
    samples: Dataset
    state: TrainingState = field(default_factory=TrainingState)
    fingerprint: dict[str, Any] = field(default_factory=dict)  # of the samples, see checkpoint.py
    identity: Identity | None = None  # of the data
    init: dict[str, str] | None = None  # the weights it started from, see initial_weights.py
    rollout_error: RolloutError | None = None  # chooses the best checkpoint, in place of the validation MSE
    last_step: dict[str, float] = field(default_factory=dict)  # means of the last step's batches

    def __post_init__(self) -> None:
        self.average = WeightAverage(self.model, self.config.train.ema)

    def steps_of_an_epoch(self) -> int:
        settings, samples = self.config.train, len(self.samples.splits["train"])
        return math.ceil(math.ceil(samples / settings.batch_size) / settings.accumulate)

    def steps_done(self) -> int:
        """Optimiser steps since the start of the training."""
        return self.state.epoch * self.steps_of_an_epoch() + self.state.step

    def train(self, writer: RunWriter | None) -> dict[str, float]:
        """Train the remaining epochs; returns what `train` does. writer: on rank 0 only."""
        settings, state, world, row = self.config.train, self.state, self.comm.world, dict[str, float]()
        count = self.steps_of_an_epoch()
        total = settings.epochs * count
        with progress_bar("training", total, enabled=writer is not None, initial=self.steps_done()) as tick:
            while not state.finished(settings):
                started = time.perf_counter() - state.sums["epoch_s"]  # its seconds before a resume
                for stop in self.steps():
                    state.sums["epoch_s"] = time.perf_counter() - started
                    tick(self._progress_note(row))
                    if writer:
                        writer.events.step(self.steps_done(), self.last_step)
                    if writer and (stop or time.monotonic() - writer.last_save >= 60 * settings.checkpoint_minutes):
                        writer.save()
                    if stop:
                        return self._stopped()
                shown, errors = Shown(), {"valid_mse": math.nan}
                if state.validates(settings):
                    errors = self._validate(shown)
                values = torch.zeros(world.size + 1, dtype=torch.float64, device="cpu")
                values[world.rank] = metrics.peak_memory_gb(next(self.model.parameters()).device)
                values[-1] = float(signals.stop_requested())
                *memory, stop = world.sum(values).tolist()
                means = {name: state.sums[name] / count for name in ("step_s", *diagnostics.PHASES, "grad_norm")}
                row = {f"train_{name}": state.sums[name] / state.sums["batches"] for name in ("loss", "mse")}
                row |= {"lr": self.optimizer.param_groups[0]["lr"], **means, **errors}
                state.sums["epoch_s"] = time.perf_counter() - started
                row |= {"peak_gb": max(memory), "epoch_s": state.sums["epoch_s"]}
                improved = state.end_epoch([*errors.values()][-1], settings)
                if writer:
                    writer.end_epoch(row, memory, shown, improved)
                    with self.average.applied():
                        callbacks.call(writer.callbacks, writer.rows[-1], self.model, self.config.run.dir)
                if stop:
                    return self._stopped()
        if writer and row:
            final = {name: row[name] for name in ("train_mse", "valid_mse")} | self._best()
            writer.events.finish(self.steps_done(), final)
        return {**row, **self._best()}

    def _validate(self, shown: Shown) -> dict[str, float]:
        """Validation errors of the averaged weights, if there are any; the last one chooses the best checkpoint."""
        with self.average.applied():
            valid = evaluate_split(self.model, self.samples, "valid", self.config, self.comm, shown)
            if not math.isfinite(valid):
                raise self._divergence(self.samples.splits["valid"], None)
            if not self.rollout_error:
                return {"valid_mse": valid}
            error = self.rollout_error(self.comm, self.config, self.model, self.samples.names[0])
            return {"valid_mse": valid, "valid_rollout_mse": error}

    def _best(self) -> dict[str, float]:
        return {"best_valid_rollout_mse" if self.rollout_error else "best_valid_mse": self.state.best}

    def steps(self) -> Iterator[bool]:
        """The remaining optimizer steps of the epoch; yields after each whether any rank received a signal to stop.

        Adds to state.sums the batches' loss and MSE, their number, the gradient norms before clipping, and seconds.
        Raises Failure, before weights change, if loss or gradient is not finite.
        """
        settings, state, sums, model = self.config.train, self.state, self.state.sums, self.model
        device, train = next(model.parameters()).device, self.samples.splits["train"]
        order = torch.randperm(len(train), generator=_seeded(settings.seed, state.epoch), device="cpu").tolist()
        batches = _chunks([train[i] for i in order], settings.batch_size)
        steps = _chunks(range(len(batches)), settings.accumulate)
        own = [batches[index] for step in steps[state.step :] for index in _own(step, self.comm)]
        graphs = prepared_batches(model, self.samples, own)
        for step in steps[state.step :]:
            model.train()
            started = time.perf_counter()
            self.optimizer.zero_grad(set_to_none=True)
            totals = torch.zeros(3, device=device)  # loss, MSE, signal to stop: summed along with the gradients
            for index in _own(step, self.comm):
                with diagnostics.phase("data_s", sums, device):
                    graph = next(graphs)
                with diagnostics.phase("forward_s", sums, device):
                    draws = _seeded(settings.seed, state.epoch, index)
                    if isinstance(model, simulator.Simulator):
                        steps_before = augmentation.own_steps(self.config, state.epoch, draws)
                        about = self.config, model, graph, self.comm, steps_before, draws.initial_seed()
                        graph = augmentation.augment(*about)
                    loss, mse = compute_loss(self.config, model, graph, self.comm, draws)
                with diagnostics.phase("backward_s", sums, device):
                    (loss / len(step)).backward()
                totals[:2] += torch.stack([loss.detach(), mse])
            totals[2] = float(signals.stop_requested())
            with diagnostics.phase("backward_s", sums, device):
                summed = self.comm.world.sum_gradients(model.parameters(), totals)
            assert summed is not None
            loss_sum, mse_sum, stop = summed.tolist()
            norm = clip_gradients(model, settings.clip)
            if not (math.isfinite(loss_sum) and math.isfinite(norm)):
                graphs.close()  # ends the thread that reads samples
                raise self._divergence([number for index in step for number in batches[index]], state.step + 1)
            for options in self.optimizer.param_groups:
                options["lr"] = state.learning_rate(settings, len(steps))
            self.optimizer.step()
            devices.synchronize(device)
            state.step += 1
            self.average.update(self.steps_done())
            losses_of_step = {"train_loss": loss_sum / len(step), "train_mse": mse_sum / len(step)}
            self.last_step = {**losses_of_step, "grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}
            for name, value in {"loss": loss_sum, "mse": mse_sum, "batches": len(step), "grad_norm": norm}.items():
                sums[name] += value
            sums["step_s"] += time.perf_counter() - started
            yield stop > 0

    def _divergence(self, numbers: list[int], step: int | None) -> Failure:
        cause = diagnostics.nonfinite_cause(self.model, self.samples, numbers, self.comm.world)
        return diagnostics.divergence(self.config, self.state.epoch, step, cause)

    def _stopped(self) -> dict[str, float]:
        return {
            **self._best(),
            "stopped": 1.0,
            "epoch": self.state.epoch + 1,
            "step": self.state.step,
        }

    def _progress_note(self, row: dict[str, float]) -> str:
        sums, epoch = self.state.sums, f"epoch {self.state.epoch + 1}/{self.config.train.epochs}"
        valid = f"  valid {row['valid_mse']:.1e}" if math.isfinite(row.get("valid_mse", math.nan)) else ""
        # the most important numbers first, because a narrow terminal cuts the end off; not the loss, which can be negative
        step_s = sums["step_s"] / self.state.step
        return f"MSE {sums['mse'] / sums['batches']:.1e}  {step_s:.2g} s/step  {epoch}{valid}"


def _open(world: Comm, config: Config, *splits: str) -> tuple[torch.device, Comm, Dataset]:
    """Device, group and samples of this process. Raises Failure if one of the splits is empty."""
    device, comm = join_device(world, config), world.split(config.train.replicas)
    samples = open_dataset(config, comm.rank, world.size)
    for split in splits:
        if not samples.splits[split]:
            raise Failure(f"{config.data.path}: no snapshot in split '{split}'; prepare data with one")
    return device, comm, samples


def _warn_without_edges(comm: Comm, config: Config, samples: Dataset) -> None:
    """Print a warning if the first training snapshot has no edge although not all are dropped. A collective call."""
    edges = comm.sum(torch.tensor(float(samples[samples.splits["train"][0]].num_edges())))
    if not edges and config.data.edge_drop < 1 and comm.world.rank == 0:
        where = f"{config.data.path}: the first training snapshot has no edges"
        more = f"; raise data.radius={config.data.radius:g}" if config.data.edges == "radius" else ""
        print(f"warning: {where}{more}", file=sys.stderr)


def train(
    world: Comm,
    config: Config,
    resume: bool = False,
    identity: Identity | None = None,
    rollout_error: RolloutError | None = None,
) -> dict[str, float]:
    """Train a model, or resume the run in run.dir; returns the last row of metrics.csv and `best_valid_mse`, with
    train.select=rollout `best_valid_rollout_mse`.

    A run that a signal stops returns `stopped`, `epoch` (from 1) and `step` (done) instead of the row. Graphs stay on the CPU.
    identity: of the data, for checkpoints. rollout_error: used with train.select=rollout.
    world: `train.replicas` groups, each of as many ranks as a graph has parts; the groups share the batches.
    """
    device, comm, samples = _open(world, config, "train", "valid")
    batches = len(_chunks(samples.splits["train"], config.train.batch_size))
    if config.train.replicas > batches:
        made = f"only {batches} batches of train.batch_size={config.train.batch_size}; lower one of the two"
        raise Failure(f"train.replicas={config.train.replicas}: {config.data.path} makes {made}")
    config = samples.complete(config)  # enters checkpoints
    model = build_model(config, samples.widths, comm, samples.statistics()).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay)
    fingerprint = checkpoint.fingerprint(samples, comm)
    trainer = Trainer(comm, config, model, optimizer, samples, fingerprint=fingerprint, identity=identity)
    trainer.rollout_error = rollout_error if config.train.select == "rollout" else None
    _warn_without_edges(comm, config, samples)
    damage = checkpoint.restore(trainer) if resume else ""
    if config.train.init and not resume:
        trainer.init = initial_weights.load(trainer)
    if world.rank == 0 and not resume:
        first = samples.splits["train"][0]  # read past the cache, which is the same on all ranks
        where = "{}: trajectory {}, frame {}".format(config.data.path, *samples.frames[first])
        for warning in input_scale.scale_warnings(samples.read(first), *samples.names, where, config.data.history > 0):
            print(f"warning: {warning}", file=sys.stderr)
    with ExitStack() as stack:
        stack.enter_context(tiled_layer.tile_threads(config.train.threads))
        writer = None
        if world.size > 1:  # rank processes receive signals, too
            stack.enter_context(signals.catch_stop_signals())
        if world.rank == 0:
            # shared with the launching process, exclusive against other runs
            stack.enter_context(filesystem.lock_folder(Path(config.run.dir), "another run is at work there", join=True))
            writer = stack.enter_context(RunWriter(trainer).open(resume, damage))
        return trainer.train(writer)


def evaluate(
    world: Comm, config: Config, weights: Path | None, split: str = "test", other_data: bool = False
) -> dict[str, float]:
    """MSE on a split by name: static (y = x), linear (x + t v, t fitted on the training split), and the model's.

    other_data: not those of the training, of which a simulator has the statistics; without a training split no linear.
    """
    device, comm, samples = _open(world, config, split)
    result: dict[str, float] = {}
    times = {"static": 0.0}
    if not other_data or samples.splits["train"]:
        times["linear"] = metrics.fitted_time((samples[n] for n in _own(samples.splits["train"], comm)), world)
    own = _own(samples.splits[split], comm)
    for name, t in times.items():
        graphs = ((g, losses.moving_nodes(g)) for g in (samples[n] for n in own))
        pairs = (((g.ndata["x"] + t * g.ndata["v"])[at], g.ndata["y"][at]) for g, at in graphs)
        result[name] = metrics.mean_squared_error(pairs, world)
    if weights is not None:
        statistics = None if other_data else samples.statistics()
        model = build_model(config, samples.widths, comm, statistics).to(device)
        checkpoint.load_weights(model, checkpoint.load(weights), weights)
        with tiled_layer.tile_threads(config.train.threads):
            result[metrics.prediction_name(config.model)] = evaluate_split(model, samples, split, config, comm)
    return result
