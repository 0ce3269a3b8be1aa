"""A simulator around every backbone: symmetry with box and gravity, inputs against plain formulas, one process and many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dgl import DGLGraph
from test_models import orthogonal
from torch import Tensor

from dist_egnn.data import domain, graphs, halo
from dist_egnn.errors import Failure
from dist_egnn.models import network
from dist_egnn.models.simulator import WALL_VECTORS, Simulator

BACKBONES = [name for name in network.MODELS if name != "Linear"]
BOX, GRAVITY, RADIUS = np.array([[0.0, 0, 0], [1, 1.2, 0.9]]), np.array([0.0, -0.02, 0.01]), 0.3


def sample(n: int, seed: int, dtype: torch.dtype = torch.float64) -> DGLGraph:
    """Particles in a box, some beyond its walls, with two past velocities and more."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.uniform(-0.02, 1.0, (n, 3)))
    v, past = (torch.from_numpy(rng.normal(0, 0.03, (n, width))) for width in (3, 6))
    nodes = {"x": x, "v": v, "past": past, "f": torch.from_numpy(rng.random((n, 2)))}
    around = domain.make_domain(GRAVITY, BOX, None)
    edges = graphs.radius_edges(domain.advance(x, v, around.gravity).numpy(), RADIUS)
    return domain.attach(graphs.build_graph(*edges, {k: t.to(dtype) for k, t in nodes.items()}), around)


def moved(graph: DGLGraph, rotation: Tensor, shift: Tensor) -> DGLGraph:
    """The sample with its walls and gravity, rotated and translated."""
    other = graph.local_var()
    other.ndata["x"] = graph.ndata["x"] @ rotation.T + shift
    for name in ("v", "past"):
        vectors = graph.ndata[name].unflatten(1, (-1, 3))
        other.ndata[name] = (vectors @ rotation.T).flatten(1)
    around = domain.get(graph)
    turned = around.gravity @ rotation.T, around.points @ rotation.T + shift, around.normals @ rotation.T
    return domain.attach(other, domain.Domain(*turned, None))


def simulator(name: str, **options: Any) -> Simulator:
    torch.manual_seed(3)
    about = {"history": 2, "walls": True, "predicts": "acceleration", "radius": RADIUS, "statistics": (0.03, 0.01, 1.0)}
    model = Simulator(network.MODELS[name], 2, 0, **{**about, "hidden": 8, "layers": 2, **options}).double()
    for key, parameter in model.named_parameters():
        if key.endswith(("phi_x.2.weight", "phi_xv.2.weight", "phi_z.2.weight")):
            torch.nn.init.normal_(parameter, std=0.2)  # larger than at initialization
    return model


@pytest.mark.parametrize("determinant", [1, -1])
@pytest.mark.parametrize("name", BACKBONES)
def test_turns_with_particles_box_and_gravity(name, determinant):
    graph = halo.batch([sample(40, 1), sample(25, 2)])
    rotation, shift = orthogonal(4, torch.float64, determinant), torch.tensor([0.3, -1.2, 2.0]).double()
    model = simulator(name)
    with torch.no_grad():
        (x, z), (x_moved, z_moved) = model(graph), model(moved(graph, rotation, shift))
    scale = (x - graph.ndata["x"]).abs().max()
    assert scale > 0.01
    assert (x_moved - x @ rotation.T - shift).abs().max() <= 1e-10 * scale
    assert torch.allclose(z_moved, z @ rotation.T + shift, atol=1e-10)
    fixed_walls = domain.attach(moved(graph, rotation, shift), domain.get(graph))  # a negative control
    with torch.no_grad():
        assert (model(fixed_walls)[0] - x @ rotation.T - shift).abs().max() > 1e-4 * scale


@pytest.mark.parametrize("name", BACKBONES)
def test_a_batch_equals_its_graphs_and_every_parameter_learns(name):
    samples, model = [sample(30, 1), sample(45, 3)], simulator(name)
    x, z = model(halo.batch(samples))
    xs, zs = zip(*(model(graph) for graph in samples), strict=True)
    assert torch.allclose(x, torch.cat(xs), atol=1e-12)
    assert torch.allclose(z, torch.cat(zs), atol=1e-12)
    ((x - 0.1).square().sum() + z.pow(3).sum()).backward()
    gradients = [p.grad for key, p in model.named_parameters() if "wall" in key or "embedding" in key]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("by_radius", [True, False])
def test_inputs_are_those_of_the_formulas(monkeypatch, by_radius):
    """Also with edges that are not those within a radius: their weight is 1."""
    graph, model = sample(50, 5), simulator("EGNN", by_radius=by_radius)
    seen: dict[str, Tensor] = {}

    def record(self: network.Network, graph: DGLGraph, nodes: Any, edges: Any) -> tuple[Tensor, Tensor]:
        seen.update(nodes | edges)
        return nodes["x"] + 0.1, nodes["x"].new_zeros(1, 0, 3)

    monkeypatch.setattr(network.Network, "forward", record)
    predicted, _ = model(graph)
    x, v, old = graph.ndata["x"], graph.ndata["v"], graph.ndata["past"][:, :3]
    g = torch.from_numpy(GRAVITY)
    assert torch.allclose(predicted, x + v + g + 0.1 * RADIUS)
    j, i = (ends.long() for ends in graph.edges())
    star = x + v + g
    r, unit = star[i] - star[j], torch.nn.functional.normalize(star[i] - star[j], eps=0)
    v_0, v_1 = v / 0.03, old / 0.03
    columns = [(x[i] - x[j]).norm(dim=1) / RADIUS, r.norm(dim=1) / RADIUS]
    columns += [((w[i] - w[j]) * unit).sum(1) for w in (v_0, v_1)] + [(w[i] - w[j]).norm(dim=1) for w in (v_0, v_1)]
    columns += [(v_0[i] * unit).sum(1), (v_0[j] * unit).sum(1)]
    assert torch.allclose(seen["e"], torch.stack(columns, 1), rtol=2e-3, atol=1e-3)  # û has a small constant
    weight = (1 - r.norm(dim=1) / RADIUS * by_radius).unsqueeze(1) * (v_0[i] - v_0[j])
    vectors = seen["v"].view(50, -1, 3)
    assert vectors.shape[1] == 2 + 2 + WALL_VECTORS
    assert torch.allclose(vectors[:, 0], v_0)
    assert torch.allclose(vectors[:, 1], v_1)
    assert torch.allclose(vectors[:, 2], (g / g.norm()).expand(50, 3))
    assert torch.allclose(vectors[:, 3], torch.zeros(50, 3).double().index_add(0, i, weight) / 12)
    middle = ((star > RADIUS) & (star < torch.from_numpy(BOX[1]) - RADIUS)).all(1)
    assert middle.any()
    assert vectors[middle, 4:].abs().max() == 0  # no wall within the radius
    assert vectors[~middle, 4:].abs().max() > 0


@pytest.mark.parametrize("predicts", ["position", "velocity", "acceleration"])
def test_displacements_are_limited(predicts):
    """Outside training, to twice the usual longest of the training split, in the same direction; shorter ones keep their bits."""
    graph = sample(40, 1)
    free, limited = simulator("EGNN", predicts=predicts), simulator("EGNN", predicts=predicts).eval()
    with torch.no_grad():
        far = free(graph)[0] - graph.ndata["x"]
        length = far.norm(dim=1, keepdim=True)
        limited.statistics[2] = length.median() / 2
        near = limited(graph)[0] - graph.ndata["x"]
    short = (length <= length.median()).squeeze(1)
    assert 0 < short.sum() < 40
    assert torch.equal(near[short], far[short])
    assert torch.allclose(near[~short], (far * length.median() / length)[~short], rtol=1e-10, atol=0)
    (limited(graph)[0] ** 2).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in limited.parameters())
    with torch.no_grad():
        assert torch.equal(limited.train()(graph)[0], free(graph)[0])  # training sees the whole error


@pytest.mark.parametrize(("predicts", "unit"), [("position", RADIUS), ("velocity", 0.03), ("acceleration", 0.01)])
def test_f_has_the_unit_of_what_is_predicted(predicts, unit):
    graph, model = sample(40, 1), simulator("EGNN", predicts=predicts)
    with torch.no_grad():
        moves = model(graph)[0] - graph.ndata["x"]
        model.statistics[:2] *= 2
        model.backbone.layers = torch.nn.ModuleList()
        base = model(graph)[0] - graph.ndata["x"]
    free = graph.ndata["v"] + torch.from_numpy(GRAVITY) if predicts == "acceleration" else torch.zeros(1, 3)
    assert torch.allclose(base, free.double().expand_as(base), atol=1e-12)
    assert 0.01 * unit < (moves - base).square().mean().sqrt() < 3 * unit


def test_missing_surroundings_and_velocities_are_named():
    graph = sample(10, 1)
    del graph.__dict__["domain"]
    with pytest.raises(Failure, match=r"data\.walls"):
        simulator("EGNN")(graph)
    graph = sample(10, 1)
    graph.ndata["past"] = graph.ndata["past"][:, :3]
    with pytest.raises(Failure, match="'past'"):
        simulator("EGNN", history=3)(graph)
