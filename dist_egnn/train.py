"""Training and evaluation of one process; every process of a run executes these on its own partitions."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dgl
import torch
from dgl import DGLGraph
from torch import Tensor

from . import checkpoint, devices, engine, losses, metrics, models
from .comm import Comm
from .config import Config, Model, to_yaml
from .errors import Failure
from .progress import bar
from .samples import Samples, ahead, open_samples


def device_of(config: Config, rank: int = 0) -> torch.device:
    """The device of a rank's parameters. Raises Failure where it is not there or the engine has no kernels for it."""
    device = devices.of(config.train.device, rank)
    engine.choose(config.model.engine, device)
    return device


def build_model(config: Config, widths: tuple[int, int], comm: Comm) -> torch.nn.Module:
    """The model of a config for F features and K node attributes, on the CPU: the same weights on every rank and device."""
    kind, options = models.choose(asdict(config.model), asdict(Model()), config.data.radius)
    torch.manual_seed(config.train.seed)
    model = kind(features=widths[0], node_attributes=widths[1], **options)
    model.comm = comm  # type: ignore[assignment]
    return model


def loss_of(
    config: Config, model: torch.nn.Module, graph: DGLGraph, comm: Comm, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """This rank's share of the loss of a batch, and of its MSE alone."""
    predicted, z = model(graph)
    total, _ = models.whole_graph(graph, graph.ndata["x"].to(predicted), comm)
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


def _batched(model: torch.nn.Module, samples: Samples, batches: list[list[int]]) -> Iterator[DGLGraph]:
    """The batches in order, each read and cut into tiles while the one before is in use."""

    def make(numbers: list[int]) -> DGLGraph:
        graph = samples[numbers[0]] if len(numbers) == 1 else dgl.batch([samples[n] for n in numbers])
        return model.prepare(graph) if isinstance(model, models.Network) else graph

    return ahead(make, batches)


def _seeded(*seed: int) -> torch.Generator:
    """A generator that depends on the seed, the epoch and the step alone, so that every rank and a resumed run agree."""
    mixed = 0
    for part in seed:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator(device="cpu").manual_seed(mixed)


def evaluate_split(model: torch.nn.Module, samples: Samples, split: str, config: Config, comm: Comm) -> float:
    """The model's MSE on every sample of a split."""
    model.eval()

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for graph in _batched(model, samples, _batches(samples.splits[split], config.train.batch_size)):
            yield model(graph)[0], graph.ndata["y"]

    with torch.no_grad():
        return metrics.mean_squared_error(pairs(), comm)


def train(comm: Comm, config: Config, resume: bool = False) -> dict[str, float]:
    """Train a model as configured; returns the last epoch's numbers. Every rank runs the same loop.

    Parameters, losses and sums live on `train.device`; graphs stay on the CPU (PyPI's DGL knows no other device).
    """
    device = device_of(config, comm.rank)
    samples = open_samples(config, comm.rank, comm.size)
    for split in ("train", "valid"):
        if not samples.splits[split]:
            raise Failure(f"{config.data.path}: no snapshot in split '{split}'; prepare data with one")
    model = build_model(config, samples.widths, comm).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay)
    # constant: a schedule all the same, so that checkpoints have one shape
    cosine = config.train.schedule == "cosine"
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / config.train.epochs)) if cosine else 1.0
    )
    folder, best, waited, first = Path(config.run.dir), math.inf, 0, 0
    if resume:
        state = checkpoint.load(folder / "last.pt")
        checkpoint.load_weights(model, state, folder / "last.pt")
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        best, waited, first = state["best"], state["waited"], state["epoch"] + 1
    if comm.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
    recorder = metrics.Recorder(folder, first) if comm.rank == 0 else None
    row: dict[str, float] = {}
    with bar("training", config.train.epochs, shown=comm.rank == 0, done=first) as tick:
        for epoch in range(first, config.train.epochs):
            if config.train.patience and waited >= config.train.patience:  # first: a resumed run may be at its end
                break
            started = time.perf_counter()
            row = _epoch(comm, config, model, optimizer, samples, epoch)
            scheduler.step()
            row["valid_mse"] = evaluate_split(model, samples, "valid", config, comm)
            row["peak_gb"] = comm.max(metrics.peak_memory_gb(device))
            row["epoch_s"] = time.perf_counter() - started
            improved = row["valid_mse"] < best
            best, waited = (row["valid_mse"], 0) if improved else (best, waited + 1)
            if recorder:
                state = _state(config, model, optimizer, scheduler, epoch, best, waited)
                if improved:
                    checkpoint.save(folder / "best.pt", state)
                recorder.add(epoch, row)
                checkpoint.save(folder / "last.pt", state)  # last: of the epochs it counts, all else is on disk
            tick(f"train {row['train_mse']:.3e}  valid {row['valid_mse']:.3e}  {row['step_s']:.2f} s/step")
    if recorder:
        recorder.close()
    return {**row, "best_valid_mse": best}


def _epoch(
    comm: Comm, config: Config, model: torch.nn.Module, optimizer: torch.optim.Optimizer, samples: Samples, epoch: int
) -> dict[str, float]:
    """One pass over the training split; the epoch's means, all partitions counted."""
    settings = config.train
    model.train()
    device, draw = next(model.parameters()).device, _seeded(settings.seed, epoch)
    order = torch.randperm(len(samples.splits["train"]), generator=draw, device=draw.device).tolist()
    batches = _batches([samples.splits["train"][i] for i in order], settings.batch_size)
    summed = torch.zeros(2, dtype=torch.float64, device=device)
    norm, steps, seconds = 0.0, 0, 0.0
    rate = optimizer.param_groups[0]["lr"]
    graphs = _batched(model, samples, batches)
    for group in _batches(list(range(len(batches))), settings.accumulate):
        optimizer.zero_grad(set_to_none=True)
        started = time.perf_counter()
        for index in group:
            loss, mse = loss_of(config, model, next(graphs), comm, _seeded(settings.seed, epoch, index))
            (loss / len(group)).backward()
            summed += torch.stack([loss.detach(), mse]).double()
        comm.sum_gradients(model.parameters())
        if settings.clip:
            norm += float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip))
        optimizer.step()
        devices.wait(device)
        seconds += time.perf_counter() - started
        steps += 1
    loss_mean, mse_mean = (comm.sum(summed) / len(batches)).tolist()
    if not math.isfinite(loss_mean):
        raise Failure(
            f"{config.run.dir}: the loss is {loss_mean} in epoch {epoch}; lower train.lr or set train.clip "
            f"(the last good checkpoint is kept)"
        )
    row = {"train_loss": loss_mean, "train_mse": mse_mean, "lr": rate, "step_s": seconds / steps}
    return {**row, "grad_norm": norm / steps} if settings.clip else row


def _state(
    config: Config, model: Any, optimizer: Any, scheduler: Any, epoch: int, best: float, waited: int
) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "epoch": epoch,
        "best": best,
        "waited": waited,
        "config": to_yaml(config),
    }


def evaluate(comm: Comm, config: Config, weights: Path | None, split: str = "test") -> dict[str, float]:
    """Test errors: the static prediction y = x, the linear one x + t v with t fitted on the training split, the model's."""
    device = device_of(config, comm.rank)
    samples = open_samples(config, comm.rank, comm.size)
    if not samples.splits[split]:
        raise Failure(f"{config.data.path}: no snapshot in split '{split}'")
    result: dict[str, float] = {}
    time_ahead = metrics.fitted_time((samples[n] for n in samples.splits["train"]), comm)
    for name, t in (("static", 0.0), ("linear", time_ahead)):
        pairs = ((g.ndata["x"] + t * g.ndata["v"], g.ndata["y"]) for g in (samples[n] for n in samples.splits[split]))
        result[name] = metrics.mean_squared_error(pairs, comm)
    if weights is not None:
        model = build_model(config, samples.widths, comm).to(device)
        checkpoint.load_weights(model, checkpoint.load(weights), weights)
        result[config.model.name] = evaluate_split(model, samples, split, config, comm)
    return result
