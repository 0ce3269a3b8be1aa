"""One suite for every model; a new model inherits it in three lines. Negative controls show that it can fail."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import dgl
import numpy as np
import pytest
import reference
import torch
from dgl import DGLGraph
from torch import Tensor

from dist_egnn.data import graphs
from dist_egnn.errors import Failure
from dist_egnn.models import network
from dist_egnn.ops import message_passing, tiling
from dist_egnn.ops.native import library as native

needs_native = pytest.mark.skipif(native.library() is None, reason="the native kernels are not compiled")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def make_graph(n: int, seed: int, dtype: torch.dtype = torch.float64, radius: float = 0.35) -> DGLGraph:
    rng = np.random.default_rng(seed)
    x = rng.random((n, 3))
    fields = {"x": x, "v": rng.normal(0, 0.3, (n, 3)), "f": rng.random((n, 3)), "a": rng.random((n, 2)), "y": x}
    nodes = {name: torch.from_numpy(value).to(dtype) for name, value in fields.items()}
    return graphs.build_graph(*graphs.radius_edges(x, radius), nodes)


def moved(graph: DGLGraph, rotation: Tensor, shift: Tensor) -> DGLGraph:
    """The sample rotated and translated."""
    other = graph.clone()
    other.ndata["x"] = graph.ndata["x"] @ rotation.T + shift
    other.ndata["v"] = graph.ndata["v"] @ rotation.T
    return other


def equivariance_error(model: torch.nn.Module, graph: DGLGraph, rotation: Tensor, shift: Tensor) -> float:
    """The largest |f(Rx + t) − (R f(x) + t)| over real and virtual nodes."""
    with torch.no_grad():
        x, z = model(graph)
        x_moved, z_moved = model(moved(graph, rotation, shift))
        pairs = ((x_moved, x), (z_moved.flatten(0, 1), z.flatten(0, 1)))
        return max(float((a - b @ rotation.T - shift).abs().max()) if len(a) else 0.0 for a, b in pairs)


def orthogonal(seed: int, dtype: torch.dtype, determinant: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    return (q * q.det().sign() * determinant).to(dtype)


def gradients(model: torch.nn.Module, graph: DGLGraph) -> dict[str, Tensor]:
    """Gradients of a scalar in which every output has another weight."""
    model.zero_grad()
    x, z = model(graph)
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    ((x * weight).sum() + z.pow(3).sum()).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def degenerate() -> list[DGLGraph]:
    """Coincident nodes, no edge (all edges dropped), one node, and one node beside another graph in a batch."""
    coincident = make_graph(12, 8)
    coincident.ndata["x"][3:7] = coincident.ndata["x"][2]
    graphs.set_edge_lengths(coincident)
    no_edges = dgl.remove_edges(make_graph(10, 9), make_graph(10, 9).edges("eid"))
    return [coincident, no_edges, make_graph(1, 10), dgl.batch([make_graph(1, 11), coincident])]


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    scale = max(float(value.abs().max()) for value in b.values())
    for name, value in b.items():
        assert float((a[name] - value).abs().max()) <= tolerance * scale, name


class ModelSuite:
    """What every model must do; subclasses name the model."""

    name: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(autouse=True)
    def every_graph_is_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 0)

    def model(self, dtype: torch.dtype = torch.float64, **options: Any) -> torch.nn.Module:
        torch.manual_seed(3)
        model = network.model_class(self.name)(features=3, node_attributes=2, **{**self.options, **options})
        for key, parameter in model.named_parameters():
            if key.endswith(("phi_x.2.weight", "phi_xv.2.weight", "phi_z.2.weight")):
                torch.nn.init.normal_(parameter, std=0.2)  # larger than at initialization
        if isinstance(model, network.Linear):
            torch.nn.init.constant_(model.t, 0.7)
        return model.to(dtype)  # after the draws, which differ between dtypes

    def rotation(self, seed: int, dtype: torch.dtype, determinant: int) -> Tensor:
        return orthogonal(seed, dtype, determinant)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("determinant", [1, -1])
    def test_rotation_reflection_translation(self, dtype: torch.dtype, determinant: int) -> None:
        graph = dgl.batch([make_graph(40, 1, dtype), make_graph(25, 2, dtype)])
        shift = torch.tensor([0.3, -1.2, 2.0], dtype=dtype)
        error = equivariance_error(self.model(dtype), graph, self.rotation(4, dtype, determinant), shift)
        assert error <= 10 * TOLERANCE[dtype]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_node_and_edge_order_do_not_matter(self, dtype: torch.dtype) -> None:
        graph, model = make_graph(50, 6, dtype), self.model(dtype)
        order, edge_order = torch.randperm(50), torch.randperm(graph.num_edges())
        inverse = order.argsort()
        src, dst = graph.edges()
        other = dgl.graph((inverse[src[edge_order]], inverse[dst[edge_order]]), num_nodes=50)
        for name, value in graph.ndata.items():
            other.ndata[name] = value[order]
        other.edata["e"] = graph.edata["e"][edge_order]
        x, z = model(graph)
        x_other, z_other = model(other)
        assert torch.allclose(x_other, x[order], atol=TOLERANCE[dtype])
        assert torch.allclose(z_other, z, atol=TOLERANCE[dtype])

    @pytest.mark.parametrize("tile", [60, 10**9])
    def test_a_batch_equals_its_graphs(self, tile: int) -> None:
        model = self.model(**({} if self.name == "Linear" else {"tile": tile}))
        samples = [make_graph(n, seed) for n, seed in ((30, 1), (1, 2), (45, 3))]
        x, z = model(dgl.batch(samples))
        xs, zs = zip(*(model(graph) for graph in samples), strict=True)
        assert torch.allclose(x, torch.cat(xs), atol=1e-12)
        assert torch.allclose(z, torch.cat(zs), atol=1e-12)

    def test_float32_is_float64_rounded(self) -> None:
        x64, z64 = self.model()(make_graph(60, 7))
        x32, z32 = self.model(torch.float32)(make_graph(60, 7, torch.float32))
        assert torch.allclose(x32.double(), x64, atol=2e-5)
        assert torch.allclose(z32.double(), z64, atol=2e-5)

    def test_degenerate_graphs_have_finite_gradients(self) -> None:
        for graph in degenerate():
            for name, gradient in gradients(self.model(), graph).items():
                assert gradient.isfinite().all(), name


class MessagePassingSuite(ModelSuite):
    """What every model with layers must do besides."""

    def reference(self, model: Any, graph: DGLGraph) -> tuple[Tensor, Tensor]:
        """The expected outputs: here the model's own in one block by DGL; better are those of reference.py."""
        tile, engine = model.tile, model.engine
        model.tile, model.engine = 10**9, "dgl"
        try:
            return type(model).forward(model, graph)
        finally:
            model.tile, model.engine = tile, engine

    def assert_equals_reference(self, model: Any, graph: DGLGraph) -> None:
        (x, z), (x_expected, z_expected) = model(graph), self.reference(model, graph)
        assert torch.allclose(x, x_expected, atol=1e-12)
        assert torch.allclose(z, z_expected, atol=1e-12)
        assert z.shape == (graph.batch_size, model.count, 3)

    def test_degenerate_graphs_equal_the_reference(self) -> None:
        for options in ({}, {"virtual_nodes": 1}) if network.model_class(self.name).virtual_nodes else ({},):
            model = self.model(**options, tile=20)
            for graph in degenerate():
                self.assert_equals_reference(model, graph)
                assert all(gradient.isfinite().all() for gradient in gradients(model, graph).values())

    @pytest.mark.parametrize("engine", ["dgl", "torch", "native"])
    @pytest.mark.parametrize("tile", [1, 40, 150, 10**9])
    def test_tiles_and_engine_do_not_matter(self, engine: str, tile: int) -> None:
        graph = dgl.batch([make_graph(50, 1), make_graph(20, 2), make_graph(35, 3)])
        model = self.model(engine=engine, tile=tile)
        if engine == "native" and self.options.get("engine") != "native":
            with pytest.raises(Failure, match=r"model\.engine=native: .* use model\.engine=auto"):
                model(graph)
            return
        tiles = model.engine_and_tiles(graph)[1]
        if engine != "native" or tile < 50:  # a native tile holds as many nodes as a block of others holds edges
            assert tiles.is_single_block == (tile == 10**9)
            assert tiles.is_single_block or sum(len(one.blocks) for one in tiles.tiles) >= 3
        self.assert_equals_reference(model, graph)
        computed = gradients(model, graph)
        model.forward = lambda g: self.reference(model, g)
        assert_close(computed, gradients(model, graph), 1e-12)

    @pytest.mark.parametrize("tile", [50, 10**9])
    def test_gradients_are_those_of_differences(self, tile: int) -> None:
        # without `normalize`, whose divisor is detached
        width = 16 if self.options.get("engine") == "native" else 4
        plain = {"normalize": False} if "normalize" in network.model_class(self.name).layer.options else {}
        graph, model = make_graph(14, 4, radius=0.6), self.model(hidden=width, layers=2, tile=tile, **plain)
        x = graph.ndata["x"].clone().requires_grad_()

        def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
            other = graph.clone()
            other.ndata["x"] = x
            return model(other)

        assert torch.autograd.gradcheck(outputs, (x,), atol=1e-6)

    def test_missing_and_misshapen_fields_are_named(self) -> None:
        wrong = {"v": None, "f": torch.zeros(10, 5), "x": torch.zeros(10, 2), "e": None}
        if not network.model_class(self.name).layer.features:
            del wrong["f"]  # not read
        for name, value in wrong.items():
            graph = make_graph(10, 1)
            (graph.edata if name == "e" else graph.ndata).pop(name)
            if value is not None:
                graph.ndata[name] = value
            with pytest.raises(Failure, match=f"'{name}'"):
                self.model()(graph)


class TestLinear(ModelSuite):
    name = "Linear"


class EGNNSuite(MessagePassingSuite):
    def reference(self, model: Any, graph: DGLGraph) -> tuple[Tensor, Tensor]:
        return reference.egnn(model, graph)


class TestEGNN(EGNNSuite):
    name = "EGNN"
    options: ClassVar = {"hidden": 8, "layers": 3}


class TestFastEGNN(EGNNSuite):
    name = "FastEGNN"
    options: ClassVar = {"hidden": 8, "layers": 3}


class TestFastEGNNWithOneVirtualNode(EGNNSuite):
    name = "FastEGNN"
    options: ClassVar = {"hidden": 8, "layers": 2, "virtual_nodes": 1, "normalize": True}


@needs_native
class TestNativeEGNN(EGNNSuite):
    name = "EGNN"
    options: ClassVar = {"hidden": 16, "layers": 2, "engine": "native", "normalize": True}


@needs_native
class TestNativeFastEGNN(EGNNSuite):
    name = "FastEGNN"
    options: ClassVar = {"hidden": 32, "layers": 3, "engine": "native"}


class TestFastEGNNWithEveryOption(EGNNSuite):
    name = "FastEGNN"
    flags: ClassVar = dict.fromkeys(("normalize", "attention", "tanh"), True)
    options: ClassVar = {"hidden": 8, "layers": 2, "virtual_nodes": 5, "gravity": [0.0, -9.81, 0.0], **flags}
    options["virtual_messages"] = "concat"

    def rotation(self, seed: int, dtype: torch.dtype, determinant: int) -> Tensor:
        # symmetric under rotations about gravity, and reflections that keep it
        c, s = math.cos(1.1), math.sin(1.1)
        return torch.tensor([[c, 0, s], [0, 1, 0], [-s * determinant, 0, c * determinant]], dtype=dtype)


class NotEquivariant(network.FastEGNN):
    """A negative control: the first coordinate differs by a factor of 1.001."""

    def forward(self, graph: DGLGraph) -> tuple[Tensor, Tensor]:
        x, z = super().forward(graph)
        return x * torch.tensor([1.001, 1.0, 1.0], dtype=x.dtype), z


def test_the_equivariance_check_fails_on_a_model_that_is_not() -> None:
    torch.manual_seed(0)
    with_gravity = TestFastEGNNWithEveryOption().model()
    zero, rotation = torch.zeros(3, dtype=torch.float64), orthogonal(1, torch.float64, 1)
    for model, error in ((NotEquivariant(3, 2, hidden=8).double(), 1e-5), (with_gravity, 1e-3)):
        assert equivariance_error(model, make_graph(30, 1), rotation, zero) > error


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(Failure, match="did you mean FastEGNN"):
        network.model_class("FastEgnn")
    with pytest.raises(Failure, match="auto, native, torch or dgl"):
        message_passing.resolve_engine("numpy")
    with pytest.raises(Failure, match="tile"):
        network.EGNN(3, 2, tile=0)(make_graph(5, 1).to("cpu"))


@pytest.mark.parametrize("tile", [50, 10**9])
def test_gradients_of_gradients_are_refused(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 0)
    graph, model = make_graph(30, 1), network.FastEGNN(3, 2, hidden=8, tile=tile).double()
    x = graph.ndata["x"].requires_grad_()
    (force,) = torch.autograd.grad(model(graph)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        force.square().sum().backward()
