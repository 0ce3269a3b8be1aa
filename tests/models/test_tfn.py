"""TFN and FastTFN: the common suite against formulas without e3nn, hidden vectors under rotations, the use of e3nn."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from math import sqrt
from typing import Any, ClassVar

import pytest
import reference
import torch
from dgl import DGLGraph
from test_models import MessagePassingSuite, make_graph, moved, orthogonal
from torch import Tensor

from dist_egnn import config
from dist_egnn.errors import Failure
from dist_egnn.models import network, resolve
from dist_egnn.ops import tiled_layer, tiling

o3 = pytest.importorskip("e3nn.o3")


def _blocks(weight: Tensor, *shapes: tuple[int, int]) -> list[Tensor]:
    """e3nn's flat weights as matrices (in, out)."""
    parts = weight.split([a * b for a, b in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def tfn_real(
    layer: Any, h: Tensor, t: Tensor, r: Tensor, e: Tensor, src: Tensor, dst: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (n, 3), m (n, H), t' (n, m, 3) by vector algebra: scalar and dot products, scalars times vectors."""
    width, m = h.shape[1], t.shape[1]
    to_a, to_b, to_t = _blocks(layer.before.weight, (width, width), (width, m), (m, m))
    a, b = h @ to_a / sqrt(width), h @ to_b / sqrt(width)
    mixed = torch.einsum("nci,cd->ndi", t, to_t) / sqrt(m)

    r = r / layer.cutoff
    d = r.norm(dim=1, keepdim=True)
    count = layer.phi_w[0].in_features - e.shape[1]
    step = 1 / (count + 1)
    centres = step * torch.arange(1, count + 1, dtype=r.dtype)
    gaussians = torch.exp(-(((d - centres) / step) ** 2)) / 1.12
    w_a, w_dot, w_b, w_t = layer.phi_w(torch.cat([gaussians, e], 1)).split([width, m, m, m], 1)
    if layer.normalize:
        r = r / (d.detach() + 1e-8)
    vector = r[:, None, :]
    scalars = torch.cat([w_a * a[src], w_dot * (mixed[src] * vector).sum(2)], 1)
    vectors = torch.cat([sqrt(3) * (w_b * b[src])[:, :, None] * vector, w_t[:, :, None] * mixed[src]], 1)
    scalars, vectors = reference.mean(scalars, dst, n), reference.mean(vectors, dst, n)

    to_m, to_tau, to_new, from_t = _blocks(layer.after.weight, (width + m, width), (2 * m, m), (2 * m, m), (m, m))
    mean = scalars @ to_m / sqrt(width + m)
    tau = torch.einsum("nci,cd->ndi", vectors, to_tau) / sqrt(2 * m)
    new = (torch.einsum("nci,cd->ndi", vectors, to_new) + torch.einsum("nci,cd->ndi", t, from_t)) / sqrt(3 * m)
    dx = layer.cutoff * torch.einsum("nc,nci->ni", layer.phi_x(mean), tau)
    return dx, mean, t + layer.phi_t(mean)[:, :, None] * new


class TFNSuite(MessagePassingSuite):
    options: ClassVar = {"hidden": 8, "layers": 2, "channels": 3, "basis": 5, "cutoff": 0.35}

    def reference(self, model: torch.nn.Module, graph: DGLGraph) -> tuple[Tensor, Tensor]:
        def initial(layer: Any, v: Tensor) -> Tensor:
            return (v / layer.cutoff)[:, None].expand(-1, layer.channels, -1)

        return reference.run(model, graph, tfn_real, initial)

    @pytest.mark.parametrize("determinant", [1, -1])
    def test_hidden_vectors_turn_by_their_own_matrices(self, determinant: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model, rotation = self.model(tile=60, layers=3), orthogonal(4, torch.float64, determinant)
        graph, matrix = make_graph(40, 1), representation(f"{model.layers[0].channels}x1o", rotation)
        shift = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
        plain, turned = (hidden(model, g, monkeypatch) for g in (graph, moved(graph, rotation, shift)))
        assert len(plain) == len(model.layers) - 1  # the last layer has none
        for (h, t), (h_turned, t_turned) in zip(plain, turned, strict=True):
            assert float(t.abs().max()) > 1e-3
            assert torch.allclose(h_turned, h, atol=1e-12)
            assert torch.allclose(t_turned, t @ matrix.T, atol=1e-12)


class TestTFN(TFNSuite):
    name = "TFN"


class TestFastTFN(TFNSuite):
    name = "FastTFN"


class TestFastTFNWithDirections(TFNSuite):
    name = "FastTFN"
    options: ClassVar = {**TFNSuite.options, "virtual_nodes": 1, "normalize": True, "channels": 1, "basis": 1}


def representation(irreps: str, rotation: Tensor) -> Tensor:
    """e3nn's representation of an orthogonal matrix, in float64, for which e3nn needs the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        return o3.Irreps(irreps).D_from_matrix(rotation)
    finally:
        torch.set_default_dtype(torch.float32)


def hidden(model: Any, graph: DGLGraph, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """h and t after every layer that has them, in the graph's order of nodes."""
    states, run_layer = [], tiled_layer.run_layer

    def recorded(layer: Any, engine: Any, tiles: tiling.Tiles, *fields: Any) -> Any:
        out = run_layer(layer, engine, tiles, *fields)
        if "t" in out:
            states.append((out["h"][tiles.inverse].detach(), out["t"][tiles.inverse].detach()))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(tiled_layer, "run_layer", recorded)
        model(graph)
    return states


def test_the_unit_of_length_does_not_matter() -> None:
    graph = make_graph(30, 2)
    other = graph.clone()
    for name in ("x", "v"):
        other.ndata[name] = 1000 * graph.ndata[name]
    x, x_other = (TestTFN().model(cutoff=c)(g)[0] for c, g in ((0.3, graph), (300.0, other)))
    assert float((x - graph.ndata["x"]).detach().abs().max()) > 1e-2
    assert torch.allclose(x_other, 1000 * x, atol=1e-9)


def test_coincident_nodes_have_gradients_of_common_size() -> None:
    graph = make_graph(12, 8)
    graph.ndata["x"][3:7] = graph.ndata["x"][2]
    graph.ndata["x"].requires_grad_()
    TestFastTFN().model()(graph)[0].pow(3).sum().backward()
    assert 0 < float(graph.ndata["x"].grad.abs().max()) < 100


def test_a_step_makes_no_tensor_on_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 0)
    graph, model = make_graph(30, 1), TestFastTFN().model(tile=60)
    x = graph.ndata["x"].requires_grad_()
    expected = torch.autograd.grad(model(graph)[0].square().sum(), x)
    with torch.device("meta"):  # tensors made without a device are there, and have no numbers
        assert torch.equal(*expected, *torch.autograd.grad(model(graph)[0].square().sum(), x))


def test_a_state_dict_holds_the_parameters_alone() -> None:
    model, graph = TestFastTFN().model(), make_graph(20, 1)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    other = network.FastTFN(3, 2, **TFNSuite.options).double()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(graph)[0], model(graph)[0])


def test_e3nn_keeps_its_optimization_defaults() -> None:
    import e3nn

    before = e3nn.get_optimization_defaults()
    network.TFN(3, **TFNSuite.options)
    assert e3nn.get_optimization_defaults() == before
    assert before["jit_mode"] == "script"


SILENT = """
import warnings
from dist_egnn.models import network
warnings.simplefilter("error")
network.FastTFN(3, hidden=4, layers=1)
"""
MISSING = """
import sys
sys.modules["e3nn"] = None
from dist_egnn import errors
from dist_egnn.models import network
network.FastEGNN(3, hidden=4)
try:
    network.FastTFN(3, hidden=4)
except errors.Failure as failure:
    print(failure)
"""


@pytest.mark.parametrize(("code", "lines"), [(SILENT, 0), (MISSING, 1)], ids=["silent", "missing"])
def test_e3nn_prints_no_warnings_and_only_tfn_needs_it(code: str, lines: int) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stderr, done.stdout.count("\n")) == ("", lines)
    assert not lines or (done.stdout.startswith("model.name=") and "pip install -e '.[tfn]'" in done.stdout)


def test_unsupported_options_are_refused() -> None:
    for options, key in (({"precision": "bf16-messages"}, "precision"), ({"attention": True}, "attention")):
        with pytest.raises(Failure, match=f"model.{key}"):
            network.TFN(3, **options)


def test_the_config_sets_channels_basis_and_cutoff() -> None:
    defaults = asdict(config.Model())
    chosen = {**defaults, "name": "FastTFN", "channels": 2, "basis": 7}
    cls, options = resolve.resolve_model(chosen, defaults, 0.3)
    assert cls is network.FastTFN
    layer: Any = cls(3, **{**options, "hidden": 4, "layers": 1}).layers[0]
    assert (layer.channels, layer.cutoff, layer.phi_w[0].in_features) == (2, 0.3, 7 + 2)
    with pytest.raises(Failure, match=r"model.channels=2: EGNN"):
        resolve.resolve_model({**defaults, "name": "EGNN", "channels": 2}, defaults, 0.3)
