"""Compare P processes with one on a snapshot of a store: outputs, loss and all gradients, in float64."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from dgl import DGLGraph
from torch import Tensor

from ..config import Config
from ..data.store import Store, open_store
from ..data.store_inputs import store_widths
from ..distributed import spawn
from ..distributed.comm import Comm, SingleProcess
from ..ops import tiled_layer
from ..train import trainer

TOLERANCE, PREDICTION = 1e-10, "prediction x"


def randomize_output_weights(model: torch.nn.Module) -> None:
    """Draw the last weights of φ_x, φ_xv and φ_z at full size: they start near zero, which would hide errors."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("phi_x.2.weight", "phi_xv.2.weight", "phi_z.2.weight")):
            drawn = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = drawn.to(parameter)


def _run_step(comm: Comm, config: Config, store: Store, graph: DGLGraph) -> dict[str, Tensor]:
    """A forward and backward pass: x (N, 3) of own nodes, z (B, C, 3), the loss, and the gradient of each parameter."""
    config = replace(config, data=replace(config.data, **asdict(store.rule)))
    widths = store_widths(store.inputs)
    model = trainer.build_model(config, widths, comm, store.statistics()).double()
    randomize_output_weights(model)
    with tiled_layer.tile_threads(config.train.threads):
        predicted, z = model(graph)
        loss, _ = trainer.compute_loss(config, model, graph, comm, torch.Generator().manual_seed(2))
        loss.backward()
    comm.sum_gradients(model.parameters())
    gradients = {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {PREDICTION: predicted.detach(), "virtual nodes z": z.detach(), "loss": comm.sum(loss.detach()), **gradients}


def save_rank_results(comm: Comm, config: Config, path: str, snapshot: int, folder: str) -> None:
    """Run a step on this rank's part and save its results as RANK.pt in the folder."""
    store = open_store(path)
    graph = store.read(snapshot, comm.rank, config.partition.halo == "exchange")
    result = _run_step(comm, config, store, graph)
    torch.save({"gid": graph.ndata["gid"], **result}, Path(folder) / f"{comm.rank}.pt")


def relative_difference(a: Tensor, b: Tensor, least: float = 0.0) -> float:
    """The largest difference relative to the largest value of b, or to ``least`` if that is larger; 0 for two zeros."""
    difference = float((a - b).abs().max()) if a.numel() else 0.0
    return difference / max(float(b.abs().max()), least) if difference else 0.0


def compare(config: Config, store: Store, snapshot: int, folder: Path) -> dict[str, float]:
    """Relative differences of P processes from one on the same cut graph, in halo mode on the full graph, by quantity."""
    arguments = config, str(store.path), snapshot, str(folder)
    spawn.run_ranks(save_rank_results, store.parts, *arguments, timeout_s=config.train.timeout_s)
    return compare_with_one_process(config, store, snapshot, folder)


def compare_with_one_process(config: Config, store: Store, snapshot: int, folder: Path) -> dict[str, float]:
    """The result of `compare`, from the files of `save_rank_results`."""
    one = _run_step(SingleProcess(), config, store, store.whole(snapshot, config.partition.halo == "exchange"))
    ranks = [torch.load(folder / f"{p}.pt", weights_only=True) for p in range(store.parts)]
    order = torch.cat([r["gid"] for r in ranks]).argsort()
    many = ranks[0] | {PREDICTION: torch.cat([r[PREDICTION] for r in ranks])[order]}
    # a gradient that is zero by symmetry (φ_z's for a block of fluid at rest, say) consists of rounding errors, so
    # gradients are compared relative to at least a thousandth of the model's largest one
    gradients = {name for name in one if name.startswith("gradient ")}
    least = 1e-3 * max((float(one[name].abs().max()) for name in gradients), default=0.0)
    return {key: relative_difference(many[key], one[key], least if key in gradients else 0.0) for key in one}
