"""The loss of a graph over partitions: each rank's share, so that the shares' sum is the loss of the whole graph.

Legend: N nodes here, B graphs, C virtual nodes, n sampled targets a graph.
"""

from __future__ import annotations

import torch
from dgl import DGLGraph
from torch import Tensor


def squared_error(predicted: Tensor, target: Tensor, total: Tensor) -> Tensor:
    """This rank's share of the mean squared error over all nodes and the 3 components. total: (B, 1) whole-graph N."""
    return (predicted - target).square().sum() / (3 * total.sum())


def kernel(a: Tensor, b: Tensor, sigma: float, name: str) -> Tensor:
    """k(a, b) of points a (…, 3), b (…, 3). gaussian: exp(−d²/2σ²), the paper's; laplacian: exp(−d/2σ²), as its
    authors ran it."""
    d = torch.linalg.vector_norm(a - b, dim=-1)
    return torch.exp(-(d if name == "laplacian" else d * d) / (2 * sigma * sigma))


def draw(total: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of 0…total−1 without replacement: the same on every rank that draws with the same generator."""
    count = min(count, total)
    if 4 * count > total:
        return torch.randperm(total, generator=generator, device=generator.device)[:count]
    while True:  # the first distinct values of a uniform sequence; cheap when count is far below total
        drawn = torch.randint(total, (2 * count + 8,), generator=generator, device=generator.device)
        seen = list(dict.fromkeys(drawn.tolist()))
        if len(seen) >= count:
            return torch.tensor(seen[:count], device=generator.device)


def mmd(
    z: Tensor,
    graph: DGLGraph,
    total: Tensor,
    *,
    sigma: float,
    samples: int,
    kernel_name: str,
    generator: torch.Generator,
) -> Tensor:
    """This rank's share of the maximum mean discrepancy of virtual nodes and targets, averaged over graphs.

        1/C² Σ_cc' k(z_c, z_c') − 2/(nC) Σ_s Σ_c k(y_s, z_c)

    over n = samples·C targets of the whole graph (at most N), drawn alike on every rank, of which each counts its own.
    The first term is weighted n_p/N. z: (B, C, 3); total: (B, 1). The graph may be on another device than z: only the
    targets chosen are taken there.
    """
    count, result = z.shape[1], z.new_zeros(())
    ids, target = graph.ndata.get("gid"), graph.ndata["y"]
    lo = 0
    for b, here in enumerate(graph.batch_num_nodes().tolist()):
        n = int(total[b])
        drawn = draw(n, samples * count, generator).to(target.device)
        own = target[lo : lo + here]
        # without ids the graph is whole and its rows are its nodes
        chosen = own[drawn if ids is None else torch.isin(ids[lo : lo + here], drawn)].to(z)
        among = kernel(z[b, :, None], z[b, None, :], sigma, kernel_name).mean() * (here / n)
        between = kernel(chosen[:, None], z[b, None, :], sigma, kernel_name).sum() * (2 / (len(drawn) * count))
        result = result + among - between
        lo += here
    return result / len(z)
