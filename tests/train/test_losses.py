"""The loss against its formula, written out."""

from __future__ import annotations

import math

import dgl
import pytest
import torch
from test_models import make_graph

from dist_egnn.config import KERNELS, Loss
from dist_egnn.train import losses


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_is_the_formula_over_the_drawn_targets(kernel: str) -> None:
    graph = dgl.batch([make_graph(30, 1), make_graph(4, 2)])
    z = torch.randn(2, 3, 3, dtype=torch.float64)
    total, settings = torch.tensor([[30.0], [4.0]]), Loss(sigma=1.5, samples=3, kernel=kernel)
    mmd = losses.mmd(z, graph, total, settings, torch.Generator().manual_seed(5))

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        d = math.dist(a.tolist(), b.tolist())
        return math.exp(-(d if kernel == "laplacian" else d * d) / (2 * 1.5**2))

    generator, expected, lo = torch.Generator().manual_seed(5), 0.0, 0
    for b, n in enumerate((30, 4)):
        drawn = losses.draw(n, 9, generator).tolist()
        assert len(set(drawn)) == len(drawn) == min(9, n)
        targets = [graph.ndata["y"][lo + i] for i in drawn]
        expected += sum(k(p, q) for p in z[b] for q in z[b]) / 9
        expected -= 2 / (len(drawn) * 3) * sum(k(y, p) for y in targets for p in z[b])
        lo += n
    assert math.isclose(float(mmd), expected / 2, rel_tol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_gradient_is_finite_for_coincident_points(kernel: str) -> None:
    graph = make_graph(6, 1)
    z = graph.ndata["y"][:3].clone().unsqueeze(0).requires_grad_()
    losses.mmd(z, graph, torch.tensor([[6.0]]), Loss(sigma=1, samples=2, kernel=kernel), torch.Generator()).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_draws_are_uniform_without_replacement() -> None:
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(1000)
    for _ in range(2000):
        drawn = losses.draw(1000, 20, generator)
        assert len(drawn.unique()) == 20
        counts[drawn] += 1
    assert (counts - 40).abs().max() < 7 * math.sqrt(40)  # 40 expected each; seven standard deviations


def test_squared_error_is_the_mean() -> None:
    a, b = torch.randn(7, 3), torch.randn(7, 3)
    assert torch.allclose(losses.squared_error(a, b, torch.tensor([[7.0]])), torch.nn.functional.mse_loss(a, b))
