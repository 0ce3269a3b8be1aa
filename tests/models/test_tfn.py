"""TFN and FastTFN: the suite of every model against formulas without e3nn, hidden vectors under rotations, and e3nn's ways."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from typing import Any, ClassVar

import dgl
import pytest
import torch
from dgl import DGLGraph
from test_models import MessagePassingSuite, assert_close, gradients, make_graph, moved, orthogonal
from torch import Tensor

from dist_egnn import config
from dist_egnn.errors import Failure
from dist_egnn.models import network
from dist_egnn.ops import tiled_layer, tiling

o3 = pytest.importorskip("e3nn.o3")


@pytest.fixture(autouse=True)
def no_graph_is_too_small_for_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 0)


def _mean(value: Tensor, dst: Tensor, n: int) -> Tensor:
    degree = torch.bincount(dst, minlength=n).clamp(min=1).to(value)
    flat = value.flatten(1)
    return (flat.new_zeros(n, flat.shape[1]).index_add(0, dst, flat) / degree[:, None]).view(n, *value.shape[1:])


def _blocks(weight: Tensor, *shapes: tuple[int, int]) -> list[Tensor]:
    """e3nn's weights, one after the other, as matrices (in, out)."""
    parts = weight.split([a * b for a, b in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _real(layer: Any, h: Tensor, t: Tensor, x: Tensor, e: Tensor, ends: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dx (n, 3), m (n, H), t' (n, m, 3) by vector algebra alone: the products of degrees 0 and 1 that keep parity are a scalar
    times a scalar, a scalar times a vector, and the dot product of two vectors."""
    (src, dst), n, width, m = ends, len(h), h.shape[1], t.shape[1]
    to_a, to_b, to_t = _blocks(layer.before.weight, (width, width), (width, m), (m, m))
    a, b = h @ to_a / sqrt(width), h @ to_b / sqrt(width)
    mixed = torch.einsum("nci,cd->ndi", t, to_t) / sqrt(m)

    r = (x[dst] - x[src]) / layer.cutoff
    d = r.norm(dim=1, keepdim=True)
    count = layer.phi_w[0].in_features - e.shape[1]
    step = 1 / (count + 1)
    centres = step * torch.arange(1, count + 1, dtype=x.dtype)
    gaussians = torch.exp(-(((d - centres) / step) ** 2)) / 1.12
    w_a, w_dot, w_b, w_t = layer.phi_w(torch.cat([gaussians, e], 1)).split([width, m, m, m], 1)
    if layer.normalize:
        r = r / (d.detach() + 1e-8)
    vector = r[:, None, :]
    said = torch.cat([w_a * a[src], w_dot * (mixed[src] * vector).sum(2)], 1)
    shown = torch.cat([sqrt(3) * (w_b * b[src])[:, :, None] * vector, w_t[:, :, None] * mixed[src]], 1)
    said, shown = _mean(said, dst, n), _mean(shown, dst, n)

    to_m, to_tau, to_new, from_t = _blocks(layer.after.weight, (width + m, width), (2 * m, m), (2 * m, m), (m, m))
    heard = said @ to_m / sqrt(width + m)
    tau = torch.einsum("nci,cd->ndi", shown, to_tau) / sqrt(2 * m)
    new = (torch.einsum("nci,cd->ndi", shown, to_new) + torch.einsum("nci,cd->ndi", t, from_t)) / sqrt(3 * m)
    dx = layer.cutoff * torch.einsum("nc,nci->ni", layer.phi_x(heard), tau)
    return dx, heard, t + layer.phi_t(heard)[:, :, None] * new


def _virtual(virtual: Any, h: Tensor, x: Tensor, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Δx, mean_c m_ic, z', s' of one graph."""
    n, count = len(x), len(z)
    gram = (z - x.mean(0)) @ (z - x.mean(0)).T
    to = x[:, None] - z
    distance = torch.linalg.vector_norm(to, dim=2, keepdim=True)
    row = [h[:, None].expand(-1, count, -1), s.expand(n, -1, -1), distance, gram.T.expand(n, -1, -1)]
    m = virtual.phi_ev(torch.cat(row, 2))
    z_next = z + (-to * virtual.phi_z(m)).mean(0)
    return (to * virtual.phi_xv(m)).mean(1), m.mean(1), z_next, s + virtual.phi_s(torch.cat([s, m.mean(0)], 1))


def _one(model: Any, graph: DGLGraph) -> tuple[Tensor, Tensor]:
    like = model.embedding.weight
    x, v, f, a = (graph.ndata[k].to(like) for k in ("x", "v", "f", "a"))
    e = graph.edata["e"].to(like)
    h, z, s = model.embedding(f), x.mean(0).expand(model.count, 3), model.s if model.count else None
    t = (v / model.layers[0].cutoff)[:, None].expand(-1, model.layers[0].channels, -1)
    for layer in model.layers:
        dx, m, t = _real(layer, h, t, x, e, graph.edges())
        x_next, said = x + dx + layer.phi_v(h) * v, [h, m]
        if s is not None:
            dx, m_virtual, z, s = _virtual(layer.virtual, h, x, z, s)
            x_next, said = x_next + dx, [*said, m_virtual]
        h, x = h + layer.phi_h(torch.cat([*said, a], 1)), x_next
    return x, z


class TFNSuite(MessagePassingSuite):
    options: ClassVar = {"hidden": 8, "layers": 2, "channels": 3, "basis": 5, "cutoff": 0.35}

    def reference(self, model: torch.nn.Module, graph: DGLGraph) -> tuple[Tensor, Tensor]:
        xs, zs = zip(*(_one(model, g) for g in dgl.unbatch(graph)), strict=True)
        return torch.cat(xs), torch.stack(zs)

    @pytest.mark.parametrize("determinant", [1, -1])
    def test_hidden_vectors_turn_by_their_own_matrices(self, determinant: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model, rotation = self.model(tile=60, layers=3), orthogonal(4, torch.float64, determinant)
        graph, matrix = make_graph(40, 1), representation(f"{model.layers[0].channels}x1o", rotation)
        shift = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
        plain, turned = (hidden(model, g, monkeypatch) for g in (graph, moved(graph, rotation, shift)))
        assert len(plain) == len(model.layers) - 1  # the last layer's are nobody's
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
    """e3nn's own matrix of an orthogonal one; it keeps to the default dtype, of which float32 is too coarse here."""
    torch.set_default_dtype(torch.float64)
    try:
        return o3.Irreps(irreps).D_from_matrix(rotation)
    finally:
        torch.set_default_dtype(torch.float32)


def hidden(model: Any, graph: DGLGraph, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """h and t after every layer that has them, in the graph's order of nodes."""
    seen, run = [], tiled_layer.run_layer

    def recorded(layer: Any, engine: Any, cut: tiling.Tiles, *fields: Any) -> Any:
        out = run(layer, engine, cut, *fields)
        if "t" in out:
            seen.append((out["h"][cut.inverse].detach(), out["t"][cut.inverse].detach()))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(tiled_layer, "run_layer", recorded)
        model(graph)
    return seen


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


@pytest.mark.parametrize("inference", [False, True])
def test_threads_share_the_tiles(inference: bool) -> None:
    graph, model = dgl.batch([make_graph(50, 1), make_graph(35, 3)]), TestFastTFN().model(tile=20)
    wanted, found = model(graph)[0], gradients(model, graph)
    torch.set_num_threads(2)
    try:
        with torch.inference_mode(inference):
            assert torch.allclose(model(graph)[0], wanted, atol=1e-13)
        if not inference:
            assert_close(gradients(model, graph), found, 1e-12)
    finally:
        torch.set_num_threads(1)


def test_a_step_makes_no_tensor_on_a_default_device() -> None:
    graph, model = make_graph(30, 1), TestFastTFN().model(tile=60)
    x = graph.ndata["x"].requires_grad_()
    wanted = torch.autograd.grad(model(graph)[0].square().sum(), x)
    with torch.device("meta"):  # where whatever is made without a device ends up, and has no numbers
        assert torch.equal(*wanted, *torch.autograd.grad(model(graph)[0].square().sum(), x))


def test_a_checkpoint_holds_parameters_and_nothing_of_e3nn(tmp_path: Path) -> None:
    model, graph = TestFastTFN().model(), make_graph(20, 1)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = network.FastTFN(3, 2, **TFNSuite.options).double()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(graph)[0], model(graph)[0])


def test_e3nn_keeps_the_mode_its_user_chose() -> None:
    import e3nn

    before = e3nn.get_optimization_defaults()
    network.TFN(3, **TFNSuite.options)
    assert e3nn.get_optimization_defaults() == before
    assert before["jit_mode"] == "script"


SILENT = """
import warnings
from dist_egnn.models import network as models
warnings.simplefilter("error")
models.FastTFN(3, hidden=4, layers=1)
"""
MISSING = """
import sys
sys.modules["e3nn"] = None
from dist_egnn import errors
from dist_egnn.models import network as models
models.FastEGNN(3, hidden=4)
try:
    models.FastTFN(3, hidden=4)
except errors.Failure as failure:
    print(failure)
"""


@pytest.mark.parametrize(("code", "told"), [(SILENT, ""), (MISSING, "e3nn")], ids=["silent", "missing"])
def test_e3nn_is_asked_for_by_tfn_alone_and_says_nothing(code: str, told: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert bool(done.stdout) == bool(told)
    if told:
        assert done.stdout.count("\n") == 1
        assert done.stdout.startswith("model.name=")
        assert done.stdout.endswith("pip install -e '.[tfn]'\n")


def test_what_it_does_not_take_is_refused() -> None:
    for options, key in (({"precision": "bf16-messages"}, "precision"), ({"attention": True}, "attention")):
        with pytest.raises(Failure, match=f"model.{key}"):
            network.TFN(3, **options)
    for key, value in (("channels", 0), ("basis", 0), ("cutoff", 0.0), ("cutoff", ".inf")):
        with pytest.raises(Failure, match=f"model.{key}"):
            config.load(None, [f"model.{key}={value}"])


def test_the_config_says_channels_basis_and_cutoff() -> None:
    defaults = asdict(config.Model())
    chosen = {**defaults, "name": "FastTFN", "channels": 2, "basis": 7}
    for radius, cutoff in ((0.3, 0.3), (float("inf"), 10.0)):
        kind, options = network.resolve_model(chosen, defaults, radius)
        assert kind is network.FastTFN
        assert (options["channels"], options["basis"], options["cutoff"]) == (2, 7, cutoff)
        layer: Any = kind(3, **{**options, "hidden": 4, "layers": 1}).layers[0]
        assert (layer.channels, layer.cutoff, layer.phi_w[0].in_features) == (2, cutoff, 7 + 2)
    assert network.resolve_model({**chosen, "cutoff": 2.5}, defaults, 0.3)[1]["cutoff"] == 2.5
    with pytest.raises(Failure, match=r"model.channels=2: EGNN has no such option"):
        network.resolve_model({**defaults, "name": "EGNN", "channels": 2}, defaults, 0.3)
