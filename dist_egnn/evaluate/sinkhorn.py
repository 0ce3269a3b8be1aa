"""The Sinkhorn divergence of two clouds of points, exact to rounding and in bounded memory at 100,000 points and more.

Neither geomloss (its large clouds need pykeops and a compiler at run time) nor POT (a matrix of N × M, 80 GB here) would do
this without much to install, so the sums are done here: block by block in torch, leaving out pairs of blocks that are proven
not to matter.

Legend: N, M points; a, b their weights, each summing to 1; C(x, y) = ‖x − y‖²; ε = blur².
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import Failure
from .metrics import rows

if TYPE_CHECKING:
    from ..distributed.comm import Comm

BLOCK = 32  # points that are kept or left out together
NEGLIGIBLE = 30.0  # e⁻³⁰ of a sum: all that is left out of it is below 1e-8 of it at 100,000 points
SCALING = 0.25  # ε from one step of the annealing to the next
LIMIT = 300  # iterations on all points
RELAX = 1.7


@dataclass
class _Cloud:
    """Points x (N, 3) in compact blocks of BLOCK, one after the other, and the logarithms of their weights (N,)."""

    x: Tensor
    log_weight: Tensor
    starts: Tensor  # (K,) first point of each block
    low: Tensor  # (K, 3) corners of its bounding box
    high: Tensor

    def reduce(self, value: Tensor, how: str) -> Tensor:
        """The maximum ("amax") of values (N,) over each block: (K,)."""
        block = torch.arange(len(self.x), device=value.device) // BLOCK
        return value.new_full((len(self.starts),), -math.inf).scatter_reduce(0, block, value, how)

    def centres(self) -> _Cloud:
        """The blocks as points: their centres of mass with their weights."""
        block = torch.arange(len(self.x), device=self.x.device) // BLOCK
        weight = self.log_weight.exp()
        total = weight.new_zeros(len(self.starts)).index_add(0, block, weight)
        mean = weight.new_zeros(len(total), 3).index_add(0, block, weight[:, None] * self.x) / total[:, None]
        return _in_blocks(mean, total)  # neighbours in order are neighbours in space here too


def _in_blocks(x: Tensor, weight: Tensor) -> _Cloud:
    starts = torch.arange(0, len(x), BLOCK)
    padded = torch.cat([x, x[-1:].expand(-len(x) % BLOCK, 3)]).view(-1, BLOCK, 3)
    return _Cloud(x, weight.log(), starts, padded.amin(1), padded.amax(1))


def _compact(x: np.ndarray) -> np.ndarray:
    """An order (N,) in which each BLOCK points fill a small box: halves across the longest axis, again and again.

    (Ranges of a Z-order curve have larger boxes: twice as many pairs of blocks would matter.)
    """
    pending, found = [np.arange(len(x))], []
    while pending:
        nodes = pending.pop()
        if len(nodes) <= BLOCK:
            found.append(nodes)
            continue
        half = BLOCK * math.ceil(len(nodes) / BLOCK / 2)
        axis = np.ptp(x[nodes], 0).argmax()
        nodes = nodes[np.argpartition(x[nodes, axis], half - 1)]
        pending += [nodes[half:], nodes[:half]]
    return np.concatenate(found)


def _cloud(x: Any, weight: Any, centre: np.ndarray, device: torch.device) -> _Cloud:
    position = rows(x)
    w = np.ones(len(position)) if weight is None else rows(weight)
    if w.shape != (len(position),) or not (w > 0).all():
        raise Failure(f"weights of shape {w.shape}: must be {len(position)} positive numbers, one a point")
    order = _compact(position)
    ordered = torch.from_numpy(position[order] - centre).to(device)
    return _in_blocks(ordered, torch.from_numpy(w[order] / w.sum()).to(device))


def _softmin(to: _Cloud, of: _Cloud, potential: Tensor, epsilon: float, comm: Comm | None) -> Tensor:
    """−ε log Σ_j w_j exp((g_j − ‖x_i − y_j‖²) / ε) for every point x_i of ``to``: (N,).

    A block of columns is left out of a block of rows if its terms cannot reach e⁻³⁰ of each row's sum: at most
    max g + max log w − d² / ε with d the distance of the two boxes, against the sum over the columns nearest to the rows.
    Processes of ``comm`` share the blocks of rows.
    """
    logit = of.log_weight + potential / epsilon
    top = of.reduce(logit, "amax")
    result = torch.zeros(len(to.x), dtype=to.x.dtype, device=to.x.device)
    squares = logit - of.x.square().sum(1) / epsilon
    columns = torch.cat([of.x * (2 / epsilon), squares[:, None]], 1)  # x·y and |y|² of the cost in one product
    along = torch.arange(BLOCK, device=to.x.device)
    rank, size = (comm.rank, comm.size) if comm is not None else (0, 1)
    for k in range(rank, len(to.starts), size):
        lo = int(to.starts[k])
        x = to.x[lo : lo + BLOCK]
        gap = (of.low - to.high[k]).clamp(min=0).maximum(to.low[k] - of.high)
        reach = top - gap.square().sum(1) / epsilon
        best = int(reach.argmax())
        near = slice(best * BLOCK, (best + 1) * BLOCK)
        bias = x.square().sum(1, keepdim=True) / epsilon
        some = torch.logsumexp(x @ columns[near, :3].T + columns[near, 3] - bias, 1).min()
        kept = torch.nonzero(reach >= some - NEGLIGIBLE).flatten()
        if len(kept) == len(reach):
            chosen = columns
        else:
            index = (kept[:, None] * BLOCK + along).flatten()
            chosen = columns[index[index < len(columns)]]
        terms = torch.addmm(chosen[:, 3], x, chosen[:, :3].T)
        largest = terms.amax(1, keepdim=True)
        # exponentials in float32, four times as fast: what they are off by is 1e-7 ε in the result; and none so small
        # that it is denormal, twenty times as slow
        summed = terms.sub_(largest).clamp_(min=-2 * NEGLIGIBLE).float().exp_().sum(1)
        result[lo : lo + BLOCK] = (largest - bias).squeeze(1) + summed.log()
    return -epsilon * (comm.sum(result) if comm is not None else result)


def _match(
    x: _Cloud, y: _Cloud, f: Tensor, g: Tensor, epsilon: float, comm: Comm | None
) -> tuple[Tensor, Tensor, float]:
    """One iteration of Sinkhorn's algorithm, and by how much the plan missed x's weights before it (Σ_i |Σ_j π_ij − a_i|).

    Near the end both potentials go RELAX times as far as they should, which needs a fraction of the iterations
    (Thibault et al., arXiv 1711.01851).
    """
    fresh = _softmin(x, y, g, epsilon, comm)
    missed = float((x.log_weight.exp() * torch.expm1((f - fresh) / epsilon).abs()).sum())
    pace = RELAX if missed < 0.3 else 1.0
    f = f + pace * (fresh - f)
    return f, g + pace * (_softmin(y, x, f, epsilon, comm) - g), missed


def _match_itself(x: _Cloud, f: Tensor, epsilon: float, comm: Comm | None) -> tuple[Tensor, float]:
    """The same for a cloud and itself, whose two potentials are one: the mean of f and what it gives converges fast."""
    fresh = _softmin(x, x, f, epsilon, comm)
    missed = float((x.log_weight.exp() * torch.expm1((f - fresh) / epsilon).abs()).sum())
    return (f + fresh) / 2, missed


def _anneal(x: _Cloud, y: _Cloud | None, blur: float, start: float, comm: Comm | None, tolerance: float) -> float:
    """OT_ε of x and y (of x and itself without y) as the dual value Σ a f + Σ b g: ε falls from start² to blur².

    While blur exceeds half a block's diagonal, blocks stand for their points: what that finds is only where the rest starts.
    """

    def step(p: _Cloud, q: _Cloud, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, float]:
        if y is not None:
            return _match(p, q, f, g, epsilon, comm)
        f, missed = _match_itself(p, f, epsilon, comm)
        return f, f, missed

    other = x if y is None else y
    least, epsilon = blur**2, start**2
    size = max(float((c.high - c.low).square().sum(1).mean()) / 4 for c in (x, other))
    few, few_other = x.centres(), other.centres()
    f, g = few.x.new_zeros(len(few.x)), few.x.new_zeros(len(few_other.x))
    while True:
        for _ in range(20):  # cheap here, and each saves one on all points
            f, g, missed = step(few, few_other, f, g)
        if epsilon * SCALING < max(least, size):
            break
        epsilon *= SCALING
    f, g = _softmin(x, few_other, g, epsilon, comm), _softmin(other, few, f, epsilon, comm)
    for _ in range(LIMIT):
        epsilon = max(epsilon * SCALING, least)
        before = missed
        f, g, missed = step(x, other, f, g)
        if epsilon == least and max(before, missed) <= tolerance:  # twice: RELAX lets it swing
            break
    else:
        warnings.warn(
            f"sinkhorn: after {LIMIT} iterations the plan still misses {missed:.1e} of the weight (tolerance {tolerance:g}); "
            "a larger blur needs fewer iterations",
            stacklevel=3,
        )
    # one exact half of an iteration, so that the plan has weight 1 and the sum is the dual value
    g = _softmin(other, x, f, epsilon, comm)
    return float((x.log_weight.exp() * f).sum() + (other.log_weight.exp() * g).sum())


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

    OT_ε = min_π Σ π C + ε KL(π | a ⊗ b) with C = ‖x − y‖² and ε = blur² (Feydy et al., arXiv 1810.08278). It is zero for
    the same cloud in any order, and ‖t‖² for a cloud and its copy shifted by t, at any ε. ``blur``: the length below
    which it does not look, say the points' spacing; ``weights``: positive, ones unless given; iterations end when the plan misses
    at most ``tolerance`` of the weight (at 0.01 S is off by less than a thousandth where that was tried). Every process of
    ``comm`` gives the whole clouds and does its share of the work.
    """
    if not blur > 0:
        raise Failure(f"blur={blur}: must be positive; the points' spacing is a good choice")
    points = [rows(c) for c in (x, y)]
    for c in points:
        if c.ndim != 2 or c.shape[1] != 3 or not len(c) or not np.isfinite(c).all():
            raise Failure(f"a cloud of shape {c.shape}: must be (N, 3), N > 0, without NaN")
    both = np.concatenate(points)
    centre, start = (both.max(0) + both.min(0)) / 2, max(float(np.linalg.norm(np.ptp(both, 0))), blur)
    a, b = (_cloud(c, w, centre, torch.device(device)) for c, w in zip(points, weights, strict=True))
    with torch.no_grad():
        cross, own, others = (_anneal(p, q, blur, start, comm, tolerance) for p, q in ((a, b), (a, None), (b, None)))
    return cross - (own + others) / 2
