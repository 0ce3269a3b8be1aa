"""Training and evaluation of one process; every process of a run executes these on its own partitions."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

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
from ..utils.progress import bar
from . import checkpoint, diagnostics, losses, metrics, optim
from .resume import Position, fingerprint, restore
from .run_dir import Desk, opened

HISTOGRAM_EVERY = 10  # epochs
Unit = TypeVar("Unit")


def device_of(config: Config, rank: int = 0) -> torch.device:
    """The device of a rank's parameters. Raises Failure where it is not there or the engine has no kernels for it."""
    device = devices.of(config.train.device, rank)
    message_passing.choose(config.model.engine, device)
    return device


def build_model(config: Config, widths: tuple[int, int], comm: Comm) -> torch.nn.Module:
    """The model of a config for F features and K node attributes, on the CPU: the same weights on every rank and device."""
    kind, options = network.choose(asdict(config.model), asdict(Model()), config.data.radius)
    exchange = config.partition.halo == "exchange" and comm.size > 1
    if exchange and not issubclass(kind, (network.Linear, network.Network)):
        raise Failure(
            f"model.name={config.model.name}: partition.halo=exchange is for models.Network, whose layers get halo nodes; "
            "use partition.halo=bridge"
        )
    torch.manual_seed(config.train.seed)
    model = kind(features=widths[0], node_attributes=widths[1], **options)
    model.comm = comm  # type: ignore[assignment]
    if isinstance(model, network.Network):
        model.exchange = exchange
    return model


def loss_of(
    config: Config, model: torch.nn.Module, graph: DGLGraph, comm: Comm, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """This rank's share of the loss of a batch, and of its MSE alone."""
    with activation_offload.on_disk(config.train.kept, [graph.edata[name] for name in graph.edata]):
        predicted, z = model(graph)
    total, _ = network.whole_graph(graph, graph.ndata["x"].to(predicted), comm)
    mse = losses.squared_error(predicted, graph.ndata["y"].to(predicted), total)
    if not (config.loss.mmd and z.shape[1]):
        return mse, mse.detach()
    mmd = losses.mmd(
        z,
        graph,
        total,
        sigma=config.loss.sigma,
        samples=config.loss.samples,
        kernel_name=config.loss.kernel,
        generator=generator,
    )
    return mse + config.loss.mmd * mmd, mse.detach()


def _batches(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def _own(batches: list[Unit], comm: Comm) -> list[Unit]:
    """Those of a step, or of a split, that this process's group takes: of K groups, group k takes k, k + K, …"""
    return batches[comm.world.rank // comm.size :: comm.world.size // comm.size]


def prepared_batches(
    model: torch.nn.Module, samples: Dataset, batches: list[list[int]]
) -> Generator[DGLGraph, None, None]:
    """The batches of samples in order; a thread reads and tiles the next one while the last one is in use."""

    def make(numbers: list[int]) -> DGLGraph:
        graph = halo.batch([samples[n] for n in numbers])
        return model.prepare(graph) if isinstance(model, network.Network) else graph

    return prefetch(make, batches)


def _seeded(*seed: int) -> torch.Generator:
    """A generator that depends on the seed, the epoch and the step alone, so that every rank and a resumed run agree."""
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
    """The model's MSE on every sample of a split. virtual: takes the positions (n, 3) of the virtual nodes that this group
    computes."""
    model.eval()
    batches = _own(_batches(samples.splits[split], config.train.batch_size), comm)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for graph in prepared_batches(model, samples, batches):
            predicted, z = model(graph)
            if virtual is not None:
                virtual.append(z.flatten(0, 1).cpu())
            yield predicted, graph.ndata["y"]

    with torch.no_grad():
        return metrics.mean_squared_error(pairs(), comm.world)


def train(world: Comm, config: Config, resume: bool = False) -> dict[str, float]:
    """Train a model as configured, or go on; returns the last epoch's numbers and `best_valid_mse`, with `stopped`,
    `epoch` and `step` if it was asked to stop. Every rank runs the same loop. world: `train.replicas` groups of as many ranks as
    a graph has parts, which share the batches.

    Parameters, losses and sums live on `train.device`; graphs stay on the CPU (PyPI's DGL knows no other device).
    """
    device, comm = device_of(config, world.rank), world.split(config.train.replicas)
    samples = open_dataset(config, comm.rank, world.size)
    for split in ("train", "valid"):
        if not samples.splits[split]:
            raise Failure(f"{config.data.path}: no snapshot in split '{split}'; prepare data with one")
    batches = len(_batches(samples.splits["train"], config.train.batch_size))
    if config.train.replicas > batches:
        raise Failure(
            f"train.replicas={config.train.replicas}: {config.data.path} makes only {batches} batches of "
            f"train.batch_size={config.train.batch_size}, so some groups would never work; lower one of the two"
        )
    model = build_model(config, samples.widths, comm).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay)
    print_of = fingerprint(samples, comm)
    position, wrong = restore(world, config, model, optimizer, print_of) if resume else (Position(), "")
    with ExitStack() as stack:
        desk = None
        if world.size > 1:  # a rank: signals reach it too, and the run's folder is its own while it lives
            stack.enter_context(signals.listening())
        if world.rank == 0:
            stack.enter_context(filesystem.hold(Path(config.run.dir), "another run is at work there", first=False))
            fresh = Desk(config, model, optimizer, position, print_of)
            desk = stack.enter_context(opened(fresh, world.size, resume, wrong))
        return _epochs(comm, config, model, optimizer, samples, position, desk)


def _epochs(
    comm: Comm, config: Config, model: Any, optimizer: Any, samples: Dataset, position: Position, desk: Desk | None
) -> dict[str, float]:
    """The loop. desk: where rank 0 writes things down."""
    settings, row = config.train, dict[str, float]()
    device = next(model.parameters()).device
    count = math.ceil(math.ceil(len(samples.splits["train"]) / settings.batch_size) / settings.accumulate)
    with bar(
        "training", settings.epochs * count, shown=desk is not None, done=position.epoch * count + position.step
    ) as tick:
        while not position.over(settings):
            mark = time.perf_counter()
            for stop in steps(comm, config, model, optimizer, samples, position):
                mark = _lap(position, mark)
                tick(_note(position, settings, row))
                if desk and (stop or desk.due()):
                    desk.save()
                if stop:
                    return _stopped(position)
            virtual: list[Tensor] | None = [] if position.epoch % HISTOGRAM_EVERY == 0 else None
            valid = evaluate_split(model, samples, "valid", config, comm, virtual)
            if not math.isfinite(valid):
                bad = diagnostics.culprit(model, samples, samples.splits["valid"], comm.world)
                raise diagnostics.diverged(config, position.epoch, None, bad)
            stop, memory = _told(comm.world, device)
            _lap(position, mark)
            row = _row(position, count, optimizer.param_groups[0]["lr"], valid, max(memory))
            epoch, improved = position.epoch, position.end_epoch(valid, settings)
            if desk:
                desk.end_epoch(epoch, row, memory, torch.cat(virtual) if virtual else None, improved)
            if stop:
                return _stopped(position)
    return {**row, "best_valid_mse": position.best}


def _lap(position: Position, mark: float) -> float:
    """Add the time since ``mark`` to the epoch's; returns now."""
    now = time.perf_counter()
    position.sums["epoch_s"] += now - mark
    return now


def _stopped(position: Position) -> dict[str, float]:
    return {"best_valid_mse": position.best, "stopped": 1.0, "epoch": position.epoch, "step": position.step}


def _note(position: Position, settings: Train, row: dict[str, float]) -> str:
    """The epoch's mean loss so far, the rate, the epoch, the last validation: what matters first, lest it be cut."""
    sums = position.sums
    valid = f"  valid {row['valid_mse']:.1e}" if row else ""
    loss, rate = sums["loss"] / sums["batches"], sums["step_s"] / position.step
    return f"loss {loss:.1e}  {rate:.2g} s/step  epoch {position.epoch + 1}/{settings.epochs}{valid}"


def _told(comm: Comm, device: torch.device) -> tuple[bool, list[float]]:
    """Whether any rank was asked to stop, and every rank's peak memory in GB."""
    told = torch.zeros(comm.size + 1, dtype=torch.float64, device="cpu")
    told[comm.rank], told[-1] = metrics.peak_memory_gb(device), float(signals.asked())
    *memory, stop = comm.sum(told).tolist()
    return stop > 0, memory


def _row(position: Position, count: int, lr: float, valid: float, peak_gb: float) -> dict[str, float]:
    """An epoch's line of metrics.csv."""
    sums = position.sums
    return {
        "train_loss": sums["loss"] / sums["batches"],
        "train_mse": sums["mse"] / sums["batches"],
        "lr": lr,
        **{name: sums[name] / count for name in ("step_s", *diagnostics.PHASES, "grad_norm")},
        "valid_mse": valid,
        "peak_gb": peak_gb,
        "epoch_s": sums["epoch_s"],
    }


def _clipped(model: torch.nn.Module, largest: float) -> float:
    """Clip the gradient's norm, if it shall be; what it was. NaN, and nothing done, if it is not finite."""
    try:  # clipping by infinity only measures
        return float(torch.nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf, error_if_nonfinite=True))
    except RuntimeError:
        return math.nan


def steps(
    comm: Comm, config: Config, model: Any, optimizer: torch.optim.Optimizer, samples: Dataset, position: Position
) -> Iterator[bool]:
    """The optimiser steps of an epoch from position.step on; yields after each whether any rank was asked to stop.

    position.sums grows by the loss and MSE of each batch, all partitions and groups counted, the number of batches, the gradient's
    norm before clipping, and seconds. Raises Failure, before the weights change, where loss or gradient is not finite.
    """
    settings, sums, epoch = config.train, position.sums, position.epoch
    device, draw = next(model.parameters()).device, _seeded(settings.seed, epoch)
    order = torch.randperm(len(samples.splits["train"]), generator=draw, device=draw.device).tolist()
    batches = _batches([samples.splits["train"][i] for i in order], settings.batch_size)
    every = _batches(list(range(len(batches))), settings.accumulate)  # of each step
    mine = [batches[index] for step in every[position.step :] for index in _own(step, comm)]
    graphs = prepared_batches(model, samples, mine)
    for step in every[position.step :]:
        model.train()
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        told = torch.zeros(3, device=device)  # loss, MSE, whether to stop: these travel with the gradients
        for index in _own(step, comm):
            with diagnostics.phase("data_s", sums, device):
                graph = next(graphs)
            with diagnostics.phase("forward_s", sums, device):
                loss, mse = loss_of(config, model, graph, comm, _seeded(settings.seed, epoch, index))
            with diagnostics.phase("backward_s", sums, device):
                (loss / len(step)).backward()
            told[:2] += torch.stack([loss.detach(), mse])
        told[2] = float(signals.asked())
        with diagnostics.phase("backward_s", sums, device):
            total = comm.world.sum_gradients(model.parameters(), told)
        assert total is not None
        lost, erred, stop = total.tolist()
        norm = _clipped(model, settings.clip)
        if not (math.isfinite(lost) and math.isfinite(norm)):
            graphs.close()  # no other thread reads samples now
            numbers = [n for index in step for n in batches[index]]
            raise diagnostics.diverged(
                config, epoch, position.step, diagnostics.culprit(model, samples, numbers, comm.world)
            )
        for options in optimizer.param_groups:
            options["lr"] = optim.rate(settings, epoch, (position.step + 1) / len(every), position.scale)
        optimizer.step()
        devices.wait(device)
        position.step += 1
        for name, value in (("loss", lost), ("mse", erred), ("batches", len(step)), ("grad_norm", norm)):
            sums[name] += value
        sums["step_s"] += time.perf_counter() - started
        yield stop > 0


def evaluate(world: Comm, config: Config, weights: Path | None, split: str = "test") -> dict[str, float]:
    """Test errors: the static prediction y = x, the linear one x + t v with t fitted on the training split, the model's."""
    device, comm = device_of(config, world.rank), world.split(config.train.replicas)
    samples = open_dataset(config, comm.rank, world.size)
    if not samples.splits[split]:
        raise Failure(f"{config.data.path}: no snapshot in split '{split}'")
    result: dict[str, float] = {}
    time_ahead = metrics.fitted_time((samples[n] for n in _own(samples.splits["train"], comm)), world)
    own = _own(samples.splits[split], comm)
    for name, t in (("static", 0.0), ("linear", time_ahead)):
        pairs = ((g.ndata["x"] + t * g.ndata["v"], g.ndata["y"]) for g in (samples[n] for n in own))
        result[name] = metrics.mean_squared_error(pairs, world)
    if weights is not None:
        model = build_model(config, samples.widths, comm).to(device)
        checkpoint.load_weights(model, checkpoint.load(weights), weights)
        result[config.model.name] = evaluate_split(model, samples, split, config, comm)
    return result
