"""The closed-form message against autograd, the product's routes against each other, and what bfloat16 messages cost."""

from __future__ import annotations

import pytest
import torch
from test_models import TestFastEGNN as Suite
from test_models import equivariance_error, make_graph, orthogonal

from dist_egnn import models
from dist_egnn.errors import Failure
from dist_egnn.nn import fused
from dist_egnn.nn.mlp import coordinate_mlp, mlp


@pytest.mark.parametrize("edges", [0, 1, 30])
def test_closed_form_is_autograds(edges: int) -> None:
    torch.manual_seed(0)
    phi_e, phi_x = mlp(2 * 8 + 3, 8, activate=True).double(), coordinate_mlp(8).double()
    w_s = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    inputs = [torch.randn(edges, n, dtype=torch.float64, requires_grad=True) for n in (8, 1, 2)]

    def plain(pre: torch.Tensor, squared: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        m = phi_e[3](phi_e[2](phi_e[1](pre + torch.cat([squared, e], 1) @ w_s.t())))
        return m, phi_x(m)

    leaves = [*inputs, w_s, *phi_e[2].parameters(), *phi_x.parameters()]
    found = fused.edge_mlp(*inputs, w_s, phi_e, phi_x)
    wanted = plain(*inputs)
    seeds = [torch.randn_like(t) for t in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-13)
    gradients = (torch.autograd.grad(outputs, leaves, seeds) for outputs in (found, wanted))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    with torch.no_grad():
        for a, b in zip(fused.edge_mlp(*inputs, w_s, phi_e, phi_x), wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-13)


def test_inference_leaves_its_inputs_alone() -> None:
    phi_e, phi_x = mlp(19, 8, activate=True), coordinate_mlp(8)
    inputs = [torch.randn(5, n) for n in (8, 1, 2)]
    before = [t.clone() for t in inputs]
    with torch.no_grad():
        fused.edge_mlp(*inputs, torch.randn(8, 3), phi_e, phi_x)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
def test_both_routes_make_the_same_product(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(fused.ROWS, 64), torch.randn(64, 64), torch.randn(64)
    weight = weight.t() if transposed else weight
    exact = x.double() @ weight.double().t() + bias.double()
    for route in (fused._onednn, torch.nn.functional.linear):
        monkeypatch.setattr(fused, "_fastest", lambda route=route: route)
        assert float((fused.product(x, weight, bias) - exact).abs().max()) < 1e-4


def test_bfloat16_messages_move_little_and_stay_nearly_equivariant() -> None:
    graph, zero = make_graph(60, 1, torch.float32), torch.zeros(3)
    exact = Suite().model(torch.float32, hidden=64)
    x, x_exact = graph.ndata["x"], exact(graph)[0].detach()
    low = Suite().model(torch.float32, hidden=64, precision="bf16-messages")
    moves = float((x_exact - x).abs().max())
    error = float((low(graph)[0].detach() - x_exact).abs().max())
    assert 0 < error < 1e-2 * moves
    assert equivariance_error(low, graph, orthogonal(1, torch.float32, 1), zero) < 1e-2 * moves
    for low_p, exact_p in zip(_gradients(low, graph), _gradients(exact, graph), strict=True):
        assert float((low_p - exact_p).norm()) <= 0.05 * float(exact_p.norm()) + 1e-6


def _gradients(model: torch.nn.Module, graph: object) -> list[torch.Tensor]:
    x, z = model(graph)
    (x.square().sum() + z.square().sum()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_impossible_precisions_are_refused() -> None:
    with pytest.raises(Failure, match=r"model\.precision=half: unknown; use float32 or bf16-messages"):
        models.EGNN(3, precision="half")
    with pytest.raises(Failure, match=r"not with model\.attention"):
        models.EGNN(3, precision="bf16-messages", attention=True)
