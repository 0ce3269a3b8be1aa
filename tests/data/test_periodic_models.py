"""Models in periodic boxes: predictions depend neither on the image of a node nor on the place of the boundary."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import dgl
import numpy as np
import pytest
import torch
from dgl import DGLGraph

from dist_egnn.data import fields, graphs
from dist_egnn.models import network
from dist_egnn.ops import tiling
from dist_egnn.ops.native import library as native

SHIFTS = np.array(list(itertools.product((-1, 0, 1), repeat=3)))
NETWORKS = [m.__name__ for m in network.MODELS.values() if issubclass(m, network.Network)]
PLAIN = [name for name in NETWORKS if not network.MODELS[name].virtual_nodes]  # type: ignore[attr-defined]
SIDE = np.array([1.0, 1.1, 1.3])
RADIUS = 0.35


@pytest.fixture(autouse=True)
def tile_every_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 0)


def make(name: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(3)
    model = network.model_class(name)(features=3, node_attributes=2, **{"hidden": 8, "layers": 3, **options}).double()
    for key, parameter in model.named_parameters():
        if key.endswith(("phi_x.2.weight", "phi_xv.2.weight", "phi_z.2.weight")):
            torch.nn.init.normal_(parameter, std=0.1)  # larger than the initial values
    return model


def random_nodes(n: int) -> dict[str, np.ndarray]:
    """Nodes all over the box, in float64."""
    draw = np.random.default_rng(0)
    x, v = draw.random((n, 3)) * SIDE, draw.normal(0, 0.3, (n, 3))
    return {"x": x, "v": v, "f": draw.random((n, 3)), "a": draw.random((n, 2))}


def periodic_graph(nodes: dict[str, np.ndarray], **changed: np.ndarray) -> DGLGraph:
    nodes = nodes | changed
    return graphs.build_graph(*graphs.radius_edges(nodes["x"], RADIUS, SIDE), nodes, SIDE)


def step(model: torch.nn.Module, graph: DGLGraph) -> np.ndarray:
    """The predicted displacement of each node (N, 3)."""
    with torch.no_grad():
        return (model(graph)[0] - graph.ndata["x"]).numpy()


assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_images_of_nodes_and_the_place_of_the_boundary_do_not_matter(name):
    """Nodes moved by lattice vectors, and all by another vector, so that other pairs meet across the boundary."""
    nodes, model = random_nodes(60), make(name)
    graph = periodic_graph(nodes)
    assert 0.1 < float((graph.edata["shift"] != 0).any(1).double().mean()) < 0.9
    expected, draw = step(model, graph), np.random.default_rng(1)
    for chosen in (draw.random(60) < 0.4, np.arange(60) == 7, np.ones(60, bool)):
        turns = draw.integers(-2, 3, (60, 3)) * chosen[:, None]
        assert turns.any()
        assert_close(step(model, periodic_graph(nodes, x=nodes["x"] + turns * SIDE)), expected)
    other = periodic_graph(nodes, x=graphs.wrap(nodes["x"] + [0.37, -0.21, 0.6], SIDE))
    assert torch.equal(torch.stack(other.edges()), torch.stack(graph.edges()))
    assert not torch.equal(other.edata["shift"], graph.edata["shift"])
    assert_close(step(model, other), expected)
    graph.edata.pop("shift")  # negative control
    assert np.abs(step(model, graph) - expected).max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [{"tile": 40, "engine": "torch"}, {"tile": 40, "engine": "dgl"}, {"tile": 10**9}, {"tile": 10, "hidden": 16}],
)
@pytest.mark.parametrize("name", PLAIN)
def test_a_periodic_box_equals_the_middle_one_of_27_images(name, options):
    """In open space among explicit images; two layers do not see beyond them."""
    nodes, model = random_nodes(25), make(name, layers=2, **options)
    images = {key: np.tile(value, (27, 1)) for key, value in nodes.items()}
    images["x"] = (nodes["x"] + (SHIFTS * SIDE)[:, None]).reshape(-1, 3)
    block = graphs.build_graph(*graphs.radius_edges(images["x"], RADIUS), images)
    middle = 25 * SHIFTS.tolist().index([0, 0, 0])
    assert SIDE.min() > 2 * RADIUS
    assert_close(step(model, periodic_graph(nodes)), step(model, block)[middle : middle + 25])


@pytest.mark.skipif(native.library() is None, reason="the native kernels are not compiled")
@pytest.mark.parametrize("tile", [7, 10**9])
def test_native_kernels_equal_torch(tile):
    """On a batch of periodic graphs: predictions and gradients."""
    batch, results = dgl.batch([periodic_graph(random_nodes(n)) for n in (40, 1, 25)]), []
    for engine in ("native", "torch"):
        model = make("FastEGNN", hidden=16, tile=tile, engine=engine)
        x = batch.ndata["x"] = batch.ndata["x"].detach().requires_grad_()
        predicted, z = model(batch)
        (predicted.pow(3).sum() + z.pow(3).sum()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([predicted.detach(), z.detach(), x.grad, *gradients])
    for found, expected in zip(*results, strict=True):
        assert_close(found.numpy(), expected.numpy(), atol=1e-10 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", NETWORKS)
def test_translations_by_lattice_vectors_and_rotations(name):
    """Of all nodes together, which holds for virtual nodes too; rotations also act on the edge field shift."""
    nodes, model = random_nodes(60), make(name)
    expected = step(model, periodic_graph(nodes))
    assert_close(step(model, periodic_graph(nodes, x=nodes["x"] + SIDE * [2, -1, 3])), expected)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    graph = periodic_graph(nodes)
    for kind, data in (("node", graph.ndata), ("edge", graph.edata)):
        for field in fields.TABLE:
            if field.on == kind and field.name in data and field.kind in ("point", "vector"):
                data[field.name] = data[field.name] @ torch.from_numpy(rotation.T)
    assert_close(step(model, graph), expected @ rotation.T)
    if name not in PLAIN:  # docs/conventions.md: virtual nodes depend on which image of a node is given
        x = nodes["x"] + np.eye(60, 3, -7) * SIDE
        assert np.abs(step(model, periodic_graph(nodes, x=x)) - expected).max() > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_finite(name):
    """Also for two nodes at the same place of different images."""
    nodes, model = random_nodes(30), make(name)
    nodes["x"][1] = nodes["x"][0] + SIDE
    graph = periodic_graph(nodes)
    assert graph.has_edges_between(0, 1)
    x = graph.ndata["x"].requires_grad_()
    predicted, z = model(graph)
    (predicted.pow(3).sum() + z.pow(3).sum()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}
    assert not [key for key, gradient in gradients.items() if not gradient.isfinite().all()]
    assert len(gradients) > 11
