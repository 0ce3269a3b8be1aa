"""Compare P processes with one on a snapshot of a store: outputs, loss and all gradients, in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from dgl import DGLGraph
from torch import Tensor

from ..config import Config
from ..data.store import Store, open_store
from ..distributed import spawn
from ..distributed.comm import Comm, SingleProcess
from ..train import trainer

TOLERANCE = 1e-10


@dataclass
class StepResult:
    """A forward and backward pass. predicted: (N, 3); virtual: (B, C, 3); gradients by parameter name."""

    predicted: Tensor
    virtual: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def randomize_output_weights(model: torch.nn.Module) -> None:
    """Draw the last weights of φ_x, φ_xv and φ_z at full size: they start near zero, which would hide errors."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("phi_x.2.weight", "phi_xv.2.weight", "phi_z.2.weight")):
            drawn = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = drawn.to(parameter)


def _run_step(comm: Comm, config: Config, store: Store, graph: DGLGraph) -> StepResult:
    widths = len(store.inputs["features"]), len(store.inputs["node_attributes"])
    model = trainer.build_model(config, widths, comm).double()
    randomize_output_weights(model)
    predicted, z = model(graph)
    loss, _ = trainer.compute_loss(config, model, graph, comm, torch.Generator().manual_seed(2))
    loss.backward()
    comm.sum_gradients(model.parameters())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return StepResult(predicted.detach(), z.detach(), comm.sum(loss.detach()), gradients)


def save_rank_results(comm: Comm, config: Config, path: str, snapshot: int, folder: str) -> None:
    """Run a step on this rank's part and save its results as RANK.pt in the folder."""
    store = open_store(path)
    graph = store.read(snapshot, comm.rank, config.partition.halo == "exchange")
    step = _run_step(comm, config, store, graph)
    result = {"gid": graph.ndata["gid"], "predicted": step.predicted}
    if comm.rank == 0:
        result |= {"virtual": step.virtual, "loss": step.loss}
        result |= {f"gradient {name}": gradient for name, gradient in step.gradients.items()}
    torch.save(result, Path(folder) / f"{comm.rank}.pt")


def relative_difference(a: Tensor, b: Tensor, least: float = 0.0) -> float:
    """The largest difference relative to the largest value of b, or to ``least`` if that is larger; 0 for two zeros."""
    difference = float((a - b).abs().max()) if a.numel() else 0.0
    return difference / max(float(b.abs().max()), least) if difference else 0.0


def compare(config: Config, store: Store, snapshot: int, folder: Path) -> dict[str, float]:
    """Relative differences between P processes and one, by quantity. ``folder`` takes temporary files.

    One process computes on the same cut graph, in halo mode on the full graph. A gradient that is zero by symmetry
    (φ_z's for a block of fluid at rest, say) consists of rounding errors, so gradients are compared relative to at
    least a thousandth of the model's largest one.
    """
    config = copy.deepcopy(config)
    arguments = config, str(store.path), snapshot, str(folder)
    spawn.run_ranks(save_rank_results, store.parts, *arguments, timeout_s=config.train.timeout_s)
    return compare_with_one_process(config, store, snapshot, folder)


def compare_with_one_process(config: Config, store: Store, snapshot: int, folder: Path) -> dict[str, float]:
    """The result of `compare`, from the files of `save_rank_results`."""
    one = _run_step(SingleProcess(), config, store, store.whole(snapshot, config.partition.halo == "exchange"))
    ranks = [torch.load(folder / f"{p}.pt", weights_only=True) for p in range(store.parts)]
    predicted = torch.cat([r["predicted"] for r in ranks])[torch.cat([r["gid"] for r in ranks]).argsort()]
    differences = {
        "prediction x": relative_difference(predicted, one.predicted),
        "virtual nodes z": relative_difference(ranks[0]["virtual"], one.virtual),
        "loss": relative_difference(ranks[0]["loss"], one.loss),
    }
    least = 1e-3 * max((float(g.abs().max()) for g in one.gradients.values()), default=0.0)
    for name, gradient in one.gradients.items():
        differences[f"gradient {name}"] = relative_difference(ranks[0][f"gradient {name}"], gradient, least)
    return differences
