"""The loss over partitions: each rank computes its share, and the shares' sum is the loss of the whole graphs.

Legend: N nodes on this rank, B graphs, C virtual nodes, n sampled targets of a graph.
"""

from __future__ import annotations

import torch
from dgl import DGLGraph
from torch import Tensor

from ..config import Loss

Index = Tensor | slice


def moving_nodes(graph: DGLGraph) -> Index:
    """The index of the nodes whose errors count: all but those that data.fixed names."""
    return graph.ndata["moving_id"] >= 0 if "moving_id" in graph.ndata else slice(None)


def squared_error(predicted: Tensor, target: Tensor, total: Tensor) -> Tensor:
    """This rank's share of the MSE of positions (N, 3). total: (B, 1), nodes of the whole graphs that count."""
    return (predicted - target).square().sum() / (3 * total.sum())


def kernel(a: Tensor, b: Tensor, sigma: float, name: str) -> Tensor:
    """k(a, b) of points (…, 3): "gaussian" exp(−d²/2σ²) as in the paper, "laplacian" exp(−d/2σ²) as in its code."""
    d = torch.linalg.vector_norm(a - b, dim=-1)
    return torch.exp(-(d if name == "laplacian" else d * d) / (2 * sigma * sigma))


def draw(total: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of 0…total−1 without replacement, equal on all ranks whose generators are equal."""
    count = min(count, total)
    if 4 * count > total:
        return torch.randperm(total, generator=generator, device=generator.device)[:count]
    while True:  # the first distinct values of a uniform sequence: cheap if count is far below total
        drawn = torch.randint(total, (2 * count + 8,), generator=generator, device=generator.device)
        distinct = list(dict.fromkeys(drawn.tolist()))
        if len(distinct) >= count:
            return torch.tensor(distinct[:count], device=generator.device)


def mmd(z: Tensor, graph: DGLGraph, total: Tensor, settings: Loss, generator: torch.Generator) -> Tensor:
    """This rank's share of the maximum mean discrepancy of virtual nodes and targets, averaged over graphs.

        1/C² Σ_cc' k(z_c, z_c') − 2/(nC) Σ_s Σ_c k(y_s, z_c)

    n = settings.samples · C targets (at most all) are drawn from the moving nodes of the whole graph, equally on all ranks;
    each sums over those that it owns, and weights the first term by its share of these nodes. z: (B, C, 3); total: (B, 1),
    moving nodes of the whole graphs. The graph may be on another device than z: only the chosen targets are moved.
    """
    count, result, lo = z.shape[1], z.new_zeros(()), 0
    ids, target = graph.ndata.get("moving_id", graph.ndata.get("gid")), graph.ndata["y"]
    for b, nodes in enumerate(graph.batch_num_nodes().tolist()):
        n = int(total[b])
        drawn = draw(n, settings.samples * count, generator).to(target.device)
        own = target[lo : lo + nodes]
        # without ids the graph is whole and row numbers are ids
        owned = int((ids[lo : lo + nodes] >= 0).sum()) if "moving_id" in graph.ndata else nodes
        chosen = own[drawn if ids is None else torch.isin(ids[lo : lo + nodes], drawn)].to(z)
        virtual = kernel(z[b, :, None], z[b, None, :], settings.sigma, settings.kernel).mean() * (owned / n)
        cross = kernel(chosen[:, None], z[b, None, :], settings.sigma, settings.kernel).sum()
        result = result + virtual - cross * (2 / (len(drawn) * count))
        lo += nodes
    return result / len(z)
