"""Training and evaluation; every process of a run executes these functions on its own partitions."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from dgl import DGLGraph
from torch import Tensor

from ..config import Config, Model, Train
from ..data import halo
from ..data.dataset import Dataset, open_dataset, prefetch
from ..distributed.comm import Comm
from ..errors import Failure
from ..models import network
from ..ops import activation_offload, message_passing
from ..utils import devices, filesystem, signals
from ..utils.progress import progress_bar
from . import checkpoint, diagnostics, losses, metrics, optim
from .resume import fingerprint, restore
from .run_writer import RunWriter
from .state import TrainingState

HISTOGRAM_EVERY = 10  # epochs
Item = TypeVar("Item")


def resolve_device(config: Config, rank: int = 0) -> torch.device:
    """The device of a rank's parameters. Raises Failure if it does not exist or model.engine does not support it."""
    device = devices.resolve(config.train.device, rank)
    message_passing.resolve_engine(config.model.engine, device)
    return device


def build_model(config: Config, widths: tuple[int, int], comm: Comm) -> torch.nn.Module:
    """The model for widths (F, K) of features and node attributes, on the CPU; all ranks draw the same weights."""
    kind, options = network.resolve_model(asdict(config.model), asdict(Model()), config.data.radius)
    exchange = config.partition.halo == "exchange" and comm.size > 1
    if exchange and not issubclass(kind, (network.Linear, network.Network)):
        raise Failure(
            f"model.name={config.model.name}: partition.halo=exchange needs a subclass of Network, whose layers receive halo "
            "nodes; set partition.halo=bridge"
        )
    torch.manual_seed(config.train.seed)
    model = kind(features=widths[0], node_attributes=widths[1], **options)
    model.comm = comm  # type: ignore[assignment]
    if isinstance(model, network.Network):
        model.requires_halo = exchange
    return model


def compute_loss(
    config: Config, model: torch.nn.Module, graph: DGLGraph, comm: Comm, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """This rank's shares of the loss and of the MSE of a batch: their sums over ranks are those of the whole graphs."""
    with activation_offload.offload_to_disk(config.train.kept, [graph.edata[name] for name in graph.edata]):
        predicted, z = model(graph)
    total, _ = network.graph_size_and_centroid(graph, graph.ndata["x"].to(predicted), comm)
    mse = losses.squared_error(predicted, graph.ndata["y"].to(predicted), total)
    if not (config.loss.mmd and z.shape[1]):
        return mse, mse.detach()
    return mse + config.loss.mmd * losses.mmd(z, graph, total, config.loss, generator), mse.detach()


def _chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def _own(items: list[Item], comm: Comm) -> list[Item]:
    """The items (batches of a step or samples of a split) of this process's group: of K groups, group k takes k, k + K, …"""
    return items[comm.world.rank // comm.size :: comm.world.size // comm.size]


def prepared_batches(
    model: torch.nn.Module, samples: Dataset, batches: list[list[int]]
) -> Generator[DGLGraph, None, None]:
    """The batches in order; a thread reads and tiles the next one while one is in use."""

    def make(numbers: list[int]) -> DGLGraph:
        graph = halo.batch([samples[n] for n in numbers])
        return model.prepare(graph) if isinstance(model, network.Network) else graph

    return prefetch(make, batches)


def _seeded(*seed: int) -> torch.Generator:
    """A generator seeded by these numbers alone (seed, epoch, batch), so that all ranks and a resumed run agree."""
    mixed = 0
    for part in seed:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator(device="cpu").manual_seed(mixed)


def evaluate_split(
    model: torch.nn.Module,
    samples: Dataset,
    split: str,
    config: Config,
    comm: Comm,
    virtual: list[Tensor] | None = None,
) -> float:
    """The model's MSE over all samples of a split. Appends this group's virtual node positions (n, 3) to ``virtual``."""
    model.eval()
    batches = _own(_chunks(samples.splits[split], config.train.batch_size), comm)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for graph in prepared_batches(model, samples, batches):
            predicted, z = model(graph)
            if virtual is not None:
                virtual.append(z.flatten(0, 1).cpu())
            yield predicted, graph.ndata["y"]

    with torch.no_grad():
        return metrics.mean_squared_error(pairs(), comm.world)


def train(world: Comm, config: Config, resume: bool = False) -> dict[str, float]:
    """Train a model, or resume the run in run.dir; returns the last row of metrics.csv and `best_valid_mse`.

    A run that a signal stops returns `stopped`, `epoch` and `step` instead of the row. Every rank runs the same loop.
    world: `train.replicas` groups, each of as many ranks as a graph has parts; the groups share the batches.
    Parameters, losses and sums are on `train.device`; graphs stay on the CPU (DGL from PyPI supports no other device).
    """
    device, comm = resolve_device(config, world.rank), world.split(config.train.replicas)
    samples = open_dataset(config, comm.rank, world.size)
    for split in ("train", "valid"):
        if not samples.splits[split]:
            raise Failure(f"{config.data.path}: no snapshot in split '{split}'; prepare data with one")
    batches = len(_chunks(samples.splits["train"], config.train.batch_size))
    if config.train.replicas > batches:
        raise Failure(
            f"train.replicas={config.train.replicas}: {config.data.path} makes only {batches} batches of "
            f"train.batch_size={config.train.batch_size}, so some groups would be idle; lower one of the two"
        )
    model = build_model(config, samples.widths, comm).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay)
    data = fingerprint(samples, comm)
    state, warning = restore(world, config, model, optimizer, data) if resume else (TrainingState(), "")
    with ExitStack() as stack:
        writer = None
        if world.size > 1:  # rank processes receive signals, too
            stack.enter_context(signals.catch_stop_signals())
        if world.rank == 0:
            # shared with the launching process, and exclusive against other runs
            stack.enter_context(filesystem.lock_folder(Path(config.run.dir), "another run is at work there", join=True))
            writer = RunWriter(config, model, optimizer, state, data).open(world.size, resume, warning)
            stack.enter_context(writer)
        return _train_epochs(comm, config, model, optimizer, samples, state, writer)


def _train_epochs(
    comm: Comm,
    config: Config,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Dataset,
    state: TrainingState,
    writer: RunWriter | None,
) -> dict[str, float]:
    """The loop over epochs. writer: on rank 0 only."""
    settings, row = config.train, dict[str, float]()
    device = next(model.parameters()).device
    count = math.ceil(math.ceil(len(samples.splits["train"]) / settings.batch_size) / settings.accumulate)
    total, done = settings.epochs * count, state.epoch * count + state.step
    with progress_bar("training", total, enabled=writer is not None, initial=done) as tick:
        while not state.finished(settings):
            mark = time.perf_counter()
            for stop in steps(comm, config, model, optimizer, samples, state):
                mark = _add_epoch_time(state, mark)
                tick(_progress_note(state, settings, row))
                if writer and (stop or writer.checkpoint_due()):
                    writer.save()
                if stop:
                    return _stopped(state)
            virtual: list[Tensor] | None = [] if state.epoch % HISTOGRAM_EVERY == 0 else None
            valid = evaluate_split(model, samples, "valid", config, comm, virtual)
            if not math.isfinite(valid):
                cause = diagnostics.nonfinite_cause(model, samples, samples.splits["valid"], comm.world)
                raise diagnostics.divergence(config, state.epoch, None, cause)
            stop, memory = _stop_and_memory(comm.world, device)
            _add_epoch_time(state, mark)
            row = _metrics_row(state, count, optimizer.param_groups[0]["lr"], valid, max(memory))
            epoch, improved = state.epoch, state.end_epoch(valid, settings)
            if writer:
                writer.end_epoch(epoch, row, memory, torch.cat(virtual) if virtual else None, improved)
            if stop:
                return _stopped(state)
    return {**row, "best_valid_mse": state.best}


def _add_epoch_time(state: TrainingState, mark: float) -> float:
    """Add the time since ``mark`` to the epoch's; returns now."""
    now = time.perf_counter()
    state.sums["epoch_s"] += now - mark
    return now


def _stopped(state: TrainingState) -> dict[str, float]:
    return {"best_valid_mse": state.best, "stopped": 1.0, "epoch": state.epoch, "step": state.step}


def _progress_note(state: TrainingState, settings: Train, row: dict[str, float]) -> str:
    """The most important numbers first, because a narrow terminal cuts the end off."""
    sums = state.sums
    valid = f"  valid {row['valid_mse']:.1e}" if row else ""
    loss, seconds = sums["loss"] / sums["batches"], sums["step_s"] / state.step
    return f"loss {loss:.1e}  {seconds:.2g} s/step  epoch {state.epoch + 1}/{settings.epochs}{valid}"


def _stop_and_memory(comm: Comm, device: torch.device) -> tuple[bool, list[float]]:
    """Whether any rank received a signal to stop, and every rank's peak memory in GB."""
    values = torch.zeros(comm.size + 1, dtype=torch.float64, device="cpu")
    values[comm.rank], values[-1] = metrics.peak_memory_gb(device), float(signals.stop_requested())
    *memory, stop = comm.sum(values).tolist()
    return stop > 0, memory


def _metrics_row(state: TrainingState, count: int, lr: float, valid: float, peak_gb: float) -> dict[str, float]:
    """An epoch's row of metrics.csv, after its ``count`` steps."""
    sums = state.sums
    return {
        "train_loss": sums["loss"] / sums["batches"],
        "train_mse": sums["mse"] / sums["batches"],
        "lr": lr,
        **{name: sums[name] / count for name in ("step_s", *diagnostics.PHASES, "grad_norm")},
        "valid_mse": valid,
        "peak_gb": peak_gb,
        "epoch_s": sums["epoch_s"],
    }


def clip_gradients(model: torch.nn.Module, max_norm: float) -> float:
    """Clip the gradient's norm (0: do not clip); returns the norm before. NaN, and no clipping, if it is not finite."""
    try:  # clipping by infinity only measures
        return float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf, error_if_nonfinite=True))
    except RuntimeError:
        return math.nan


def steps(
    comm: Comm,
    config: Config,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Dataset,
    state: TrainingState,
) -> Iterator[bool]:
    """The optimizer steps of an epoch from state.step on; yields after each whether any rank received a signal to stop.

    Adds to state.sums the loss and MSE of each batch (summed over partitions and groups), the number of batches, the
    gradient norm before clipping, and seconds. Raises Failure, before weights change, if loss or gradient is not finite.
    """
    settings, sums, epoch = config.train, state.sums, state.epoch
    device, generator = next(model.parameters()).device, _seeded(settings.seed, epoch)
    order = torch.randperm(len(samples.splits["train"]), generator=generator, device=generator.device).tolist()
    batches = _chunks([samples.splits["train"][i] for i in order], settings.batch_size)
    batches_of_steps = _chunks(range(len(batches)), settings.accumulate)
    remaining = batches_of_steps[state.step :]
    graphs = prepared_batches(model, samples, [batches[index] for step in remaining for index in _own(step, comm)])
    for step in remaining:
        model.train()
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(3, device=device)  # loss, MSE, signal to stop: summed along with the gradients
        for index in _own(step, comm):
            with diagnostics.phase("data_s", sums, device):
                graph = next(graphs)
            with diagnostics.phase("forward_s", sums, device):
                loss, mse = compute_loss(config, model, graph, comm, _seeded(settings.seed, epoch, index))
            with diagnostics.phase("backward_s", sums, device):
                (loss / len(step)).backward()
            totals[:2] += torch.stack([loss.detach(), mse])
        totals[2] = float(signals.stop_requested())
        with diagnostics.phase("backward_s", sums, device):
            summed = comm.world.sum_gradients(model.parameters(), totals)
        assert summed is not None
        loss_sum, mse_sum, stop = summed.tolist()
        norm = clip_gradients(model, settings.clip)
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            graphs.close()  # ends the thread that reads samples
            numbers = [number for index in step for number in batches[index]]
            cause = diagnostics.nonfinite_cause(model, samples, numbers, comm.world)
            raise diagnostics.divergence(config, epoch, state.step, cause)
        for options in optimizer.param_groups:
            fraction = (state.step + 1) / len(batches_of_steps)
            options["lr"] = optim.learning_rate(settings, epoch, fraction, state.scale)
        optimizer.step()
        devices.synchronize(device)
        state.step += 1
        for name, value in (("loss", loss_sum), ("mse", mse_sum), ("batches", len(step)), ("grad_norm", norm)):
            sums[name] += value
        sums["step_s"] += time.perf_counter() - started
        yield stop > 0


def evaluate(world: Comm, config: Config, weights: Path | None, split: str = "test") -> dict[str, float]:
    """MSE on a split by name: static (y = x), linear (x + t v, t fitted on the training split), and the model's."""
    device, comm = resolve_device(config, world.rank), world.split(config.train.replicas)
    samples = open_dataset(config, comm.rank, world.size)
    if not samples.splits[split]:
        raise Failure(f"{config.data.path}: no snapshot in split '{split}'")
    result: dict[str, float] = {}
    fitted = metrics.fitted_time((samples[n] for n in _own(samples.splits["train"], comm)), world)
    own = _own(samples.splits[split], comm)
    for name, t in (("static", 0.0), ("linear", fitted)):
        pairs = ((g.ndata["x"] + t * g.ndata["v"], g.ndata["y"]) for g in (samples[n] for n in own))
        result[name] = metrics.mean_squared_error(pairs, world)
    if weights is not None:
        model = build_model(config, samples.widths, comm).to(device)
        checkpoint.load_weights(model, checkpoint.load(weights), weights)
        result[config.model.name] = evaluate_split(model, samples, split, config, comm)
    return result
