"""The closed form of messages against autograd, the routes of a product, and the error of bfloat16 messages."""

from __future__ import annotations

import pytest
import torch
from test_models import TestFastEGNN as Suite
from test_models import equivariance_error, make_graph, orthogonal

from dist_egnn.errors import Failure
from dist_egnn.models import fused_mlp, network
from dist_egnn.models.mlp import coordinate_mlp, mlp


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("attributes", [0, 2])
@pytest.mark.parametrize("messages", [0, 1, 30])
def test_closed_form_equals_autograd(messages: int, attributes: int, count: int) -> None:
    torch.manual_seed(0)
    phi = mlp(2 * 8 + 3, 8, activate=True).double()
    coordinate = [coordinate_mlp(8).double() for _ in range(count)]
    w_s = torch.randn(8, 1 + attributes, dtype=torch.float64, requires_grad=True)
    pre, distance, e = (torch.randn(messages, n, dtype=torch.float64, requires_grad=True) for n in (8, 1, attributes))
    scalars = [distance, e] if attributes else [distance]

    def closed() -> tuple[torch.Tensor, ...]:
        return fused_mlp.message_mlp(pre * 1, distance, e if attributes else None, w_s, phi, coordinate)

    m = phi[1:](pre + torch.cat(scalars, 1) @ w_s.t())
    expected = m, *(c(m) for c in coordinate)
    outputs = closed()
    leaves = [pre, *scalars, w_s, *phi[2].parameters(), *(p for c in coordinate for p in c.parameters())]
    seeds = [torch.randn_like(t) for t in expected]
    gradients = (torch.autograd.grad(roots, leaves, seeds) for roots in (outputs, expected))
    with torch.no_grad():
        for a, b, c in zip(outputs, closed(), expected, strict=True):
            assert torch.allclose(a, c, atol=1e-13)
            assert torch.allclose(b, c, atol=1e-13)
        for a, b in zip(*gradients, strict=True):
            assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("rows", [fused_mlp.ONEDNN_ROWS, 2 * fused_mlp.ONEDNN_ROWS + 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_both_routes_give_the_same_product(transposed: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(rows, 64), torch.randn(64, 64), torch.randn(64)
    weight = weight.t() if transposed else weight
    for given in (bias, None):
        exact = x.double() @ weight.double().t() + (0 if given is None else given.double())
        for onednn in (True, False):
            monkeypatch.setattr(fused_mlp, "onednn_is_faster", lambda onednn=onednn: onednn)
            assert float((fused_mlp.fast_linear(x, weight, given) - exact).abs().max()) < 1e-4


def test_bfloat16_messages_are_accurate_and_nearly_equivariant() -> None:
    graph, zero = make_graph(60, 1, torch.float32), torch.zeros(3)
    exact = Suite().model(torch.float32, hidden=64)
    x, x_exact = graph.ndata["x"], exact(graph)[0].detach()
    low = Suite().model(torch.float32, hidden=64, precision="bf16-messages")
    moves = float((x_exact - x).abs().max())
    error = float((low(graph)[0].detach() - x_exact).abs().max())
    assert 0 < error < 1e-2 * moves
    assert equivariance_error(low, graph, orthogonal(1, torch.float32, 1), zero) < 1e-2 * moves
    expected = _gradients(exact, graph)
    largest = max(float(p.norm()) for p in expected)
    for low_p, exact_p in zip(_gradients(low, graph), expected, strict=True):
        assert float((low_p - exact_p).norm()) <= 0.05 * max(float(exact_p.norm()), 1e-3 * largest)


def _gradients(model: torch.nn.Module, graph: object) -> list[torch.Tensor]:
    x, z = model(graph)
    (x.square().sum() + z.square().sum()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_unsupported_precisions_are_refused() -> None:
    with pytest.raises(Failure, match=r"model\.precision=half.*float32"):
        network.EGNN(3, precision="half")
    with pytest.raises(Failure, match=r"model\.precision=bf16-messages.*model\.attention"):
        network.EGNN(3, precision="bf16-messages", attention=True)
