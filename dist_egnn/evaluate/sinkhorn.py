"""The Sinkhorn divergence of two point clouds, in bounded memory also at 100,000 points and more.

Sums run over pairs of blocks of points; pairs with a provably negligible contribution are skipped. (geomloss needs
pykeops and a compiler for large clouds, POT the N × M matrix, 80 GB at 100,000 points.)

Legend: N, M points; a, b their weights, each summing to 1; C(x, y) = ‖x − y‖²; ε = blur².
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed.comm import Comm, SingleProcess
from ..errors import Failure
from .metrics import to_float64

BLOCK = 32  # points
NEGLIGIBLE = 30.0  # skips terms below e⁻³⁰ of a sum: in total below 1e-8 of it at 100,000 points
SCALING = 0.25  # of ε between steps of the annealing
LIMIT = 300  # iterations on all points
RELAX = 1.7  # over-relaxation


@dataclass
class _Cloud:
    """Points x (N, 3), consecutive in compact blocks of BLOCK, and the logarithms of their weights (N,)."""

    x: Tensor
    log_weight: Tensor
    block: Tensor  # (N,) number of each point's block
    low: Tensor  # (K, 3) corners of the bounding box of each block
    high: Tensor

    def centres(self) -> _Cloud:
        """A coarse cloud: the centre of mass and the weight of each block."""
        weight = self.log_weight.exp()
        total = weight.new_zeros(len(self.low)).index_add(0, self.block, weight)
        mean = weight.new_zeros(len(total), 3).index_add(0, self.block, weight[:, None] * self.x) / total[:, None]
        return _in_blocks(mean, total)  # consecutive centres are close in space, too


def _in_blocks(x: Tensor, weight: Tensor) -> _Cloud:
    padded = torch.cat([x, x[-1:].expand(-len(x) % BLOCK, 3)]).view(-1, BLOCK, 3)
    return _Cloud(x, weight.log(), torch.arange(len(x), device=x.device) // BLOCK, padded.amin(1), padded.amax(1))


def _compact(x: np.ndarray) -> np.ndarray:
    """An order (N,) in which each BLOCK points fill a small box, by recursive bisection of the longest axis."""
    # a Z-order curve gives larger boxes: twice as many pairs of blocks contribute
    pending, blocks = [np.arange(len(x))], []
    while pending:
        nodes = pending.pop()
        if len(nodes) <= BLOCK:
            blocks.append(nodes)
            continue
        half = BLOCK * math.ceil(len(nodes) / BLOCK / 2)
        axis = np.ptp(x[nodes], 0).argmax()
        nodes = nodes[np.argpartition(x[nodes, axis], half - 1)]
        pending += [nodes[half:], nodes[:half]]
    return np.concatenate(blocks)


def _cloud(x: Any, weight: Any, centre: np.ndarray, device: torch.device) -> _Cloud:
    position = to_float64(x)
    w = np.ones(len(position)) if weight is None else to_float64(weight)
    if w.shape != (len(position),) or not (w > 0).all():
        raise Failure(f"weights of shape {w.shape}: must be {len(position)} positive numbers, one per point")
    order = _compact(position)
    ordered = torch.from_numpy(position[order] - centre).to(device)
    return _in_blocks(ordered, torch.from_numpy(w[order] / w.sum()).to(device))


def _softmin(to: _Cloud, of: _Cloud, potential: Tensor, epsilon: float, comm: Comm) -> Tensor:
    """−ε log Σ_j w_j exp((g_j − ‖x_i − y_j‖²) / ε) for every point x_i of ``to``: (N,). Processes share the rows.

    A block of columns is skipped for a block of rows if its terms are below e⁻³⁰ of each row's sum: their logarithm is
    at most max(g / ε + log w) − d² / ε, d the distance of the boxes, and the block with the largest such bound provides
    a lower bound of the sum.
    """
    logit = of.log_weight + potential / epsilon
    top = logit.new_full((len(of.low),), -math.inf).scatter_reduce(0, of.block, logit, "amax")  # of each block
    result = torch.zeros(len(to.x), dtype=to.x.dtype, device=to.x.device)
    squares = logit - of.x.square().sum(1) / epsilon
    columns = torch.cat([of.x * (2 / epsilon), squares[:, None]], 1)  # x·y and |y|² of the cost in one product
    along = torch.arange(BLOCK, device=to.x.device)
    for k in range(comm.rank, len(to.low), comm.size):
        rows = slice(k * BLOCK, (k + 1) * BLOCK)
        x = to.x[rows]
        gap = (of.low - to.high[k]).clamp(min=0).maximum(to.low[k] - of.high)
        reach = top - gap.square().sum(1) / epsilon
        best = int(reach.argmax())
        dominant = slice(best * BLOCK, (best + 1) * BLOCK)
        bias = x.square().sum(1, keepdim=True) / epsilon
        lower = torch.logsumexp(x @ columns[dominant, :3].T + columns[dominant, 3] - bias, 1).min()
        blocks = torch.nonzero(reach >= lower - NEGLIGIBLE).flatten()
        index = (blocks[:, None] * BLOCK + along).flatten()
        chosen = columns if len(blocks) == len(reach) else columns[index[index < len(columns)]]
        terms = torch.addmm(chosen[:, 3], x, chosen[:, :3].T)
        largest = terms.amax(1, keepdim=True)
        # float32 is four times as fast, with an error of 1e-7 ε; the clamp prevents slow denormal numbers
        summed = terms.sub_(largest).clamp_(min=-2 * NEGLIGIBLE).float().exp_().sum(1)
        result[rows] = (largest - bias).squeeze(1) + summed.log()
    return -epsilon * comm.sum(result)


def _iterate(x: _Cloud, y: _Cloud, f: Tensor, g: Tensor, epsilon: float, comm: Comm) -> tuple[Tensor, Tensor, float]:
    """One iteration of Sinkhorn's algorithm, and the error of the plan's marginal before it, Σ_i |Σ_j π_ij − a_i|.

    For a cloud and itself (y is x) both potentials are equal, and averaging converges fast. Otherwise over-relaxation
    near the end reduces the number of iterations (Thibault et al., arXiv 1711.01851).
    """
    new = _softmin(x, y, g, epsilon, comm)
    error = float((x.log_weight.exp() * torch.expm1((f - new) / epsilon).abs()).sum())
    if y is x:
        f = (f + new) / 2
        return f, f, error
    relax = RELAX if error < 0.3 else 1.0
    f = f + relax * (new - f)
    return f, g + relax * (_softmin(y, x, f, epsilon, comm) - g), error


def _anneal(x: _Cloud, y: _Cloud, blur: float, start: float, comm: Comm, tolerance: float) -> float:
    """OT_ε of x and y, which may be the same object, as the dual value Σ a f + Σ b g; ε falls from start² to blur².

    While blur exceeds half a block's diagonal, the coarse clouds provide the start of the iterations on all points.
    """
    least, epsilon = blur**2, start**2
    size = max(float((c.high - c.low).square().sum(1).mean()) / 4 for c in (x, y))
    coarse_x = x.centres()
    coarse_y = coarse_x if y is x else y.centres()
    f, g = torch.zeros_like(coarse_x.log_weight), torch.zeros_like(coarse_y.log_weight)
    while True:
        for _ in range(20):  # cheap, and each saves an iteration on all points
            f, g, error = _iterate(coarse_x, coarse_y, f, g, epsilon, comm)
        if epsilon * SCALING < max(least, size):
            break
        epsilon *= SCALING
    f, g = _softmin(x, coarse_y, g, epsilon, comm), _softmin(y, coarse_x, f, epsilon, comm)
    for _ in range(LIMIT):
        epsilon = max(epsilon * SCALING, least)
        before = error
        f, g, error = _iterate(x, y, f, g, epsilon, comm)
        if epsilon == least and max(before, error) <= tolerance:  # twice, because over-relaxation oscillates
            break
    else:
        state = f"the weights' error is {error:.1e} (tolerance {tolerance:g})"
        warnings.warn(f"sinkhorn: after {LIMIT} iterations {state}; a larger blur needs fewer", stacklevel=3)
    # an exact half iteration, after which the plan has weight 1 and the sum is the dual value
    g = _softmin(y, x, f, epsilon, comm)
    return float((x.log_weight.exp() * f).sum() + (y.log_weight.exp() * g).sum())


def divergence(
    x: Any,
    y: Any,
    blur: float,
    weights: tuple[Any, Any] = (None, None),
    *,
    comm: Comm | None = None,
    tolerance: float = 1e-2,
    device: str | torch.device = "cpu",
) -> float:
    """The Sinkhorn divergence S_ε = OT_ε(x, y) − ½ OT_ε(x, x) − ½ OT_ε(y, y) of clouds x (N, 3) and y (M, 3), length².

    OT_ε = min_π Σ π C + ε KL(π | a ⊗ b) (Feydy et al., arXiv 1810.08278). Zero for equal clouds in any order, ‖t‖² for a
    cloud and its copy shifted by t. ``blur``: a length, such as the points' spacing; ``weights``: positive, default 1;
    ``tolerance``: summed error of the plan's weights at which iterations end. With ``comm`` a collective call on whole
    clouds, in which every process computes a share.
    """
    if not blur > 0:
        raise Failure(f"blur={blur}: must be positive; the points' spacing is a good choice")
    points = [to_float64(c) for c in (x, y)]
    for c in points:
        if c.ndim != 2 or c.shape[1] != 3 or not len(c) or not np.isfinite(c).all():
            raise Failure(f"a cloud of shape {c.shape}: must be (N, 3), N > 0, without NaN")
    both = np.concatenate(points)
    centre, start = (both.max(0) + both.min(0)) / 2, max(float(np.linalg.norm(np.ptp(both, 0))), blur)
    a, b = (_cloud(c, w, centre, torch.device(device)) for c, w in zip(points, weights, strict=True))
    group = comm or SingleProcess()
    with torch.no_grad():
        cross, own, others = (_anneal(p, q, blur, start, group, tolerance) for p, q in ((a, b), (a, a), (b, b)))
    return cross - (own + others) / 2
