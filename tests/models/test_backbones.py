"""RF, SchNet and their virtual-node twins: the suite of every model, what is theirs alone, and FastEGNN against slow.py."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import reference
import slow
import torch
from dgl import DGLGraph
from test_models import EGNNSuite, MessagePassingSuite, make_graph
from torch import Tensor

from dist_egnn import config
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.models import network, schnet
from dist_egnn.train import trainer


class RFSuite(MessagePassingSuite):
    def reference(self, model: Any, graph: DGLGraph) -> tuple[Tensor, Tensor]:
        return reference.rf(model, graph)


class TestRF(RFSuite):
    name = "RF"
    options: ClassVar = {"hidden": 8, "layers": 3}


class TestFastRF(RFSuite):
    name = "FastRF"
    options: ClassVar = {"hidden": 8, "layers": 3, "normalize": True}


class SchNetSuite(MessagePassingSuite):
    def reference(self, model: Any, graph: DGLGraph) -> tuple[Tensor, Tensor]:
        return reference.schnet(model, graph)


class TestSchNet(SchNetSuite):
    name = "SchNet"
    options: ClassVar = {"hidden": 8, "layers": 3, "basis": 7, "cutoff": 0.4, "normalize": True}


class TestFastSchNet(SchNetSuite):
    name = "FastSchNet"
    options: ClassVar = {"hidden": 8, "layers": 3, "basis": 7, "cutoff": 0.4}


@pytest.mark.parametrize("suite", [TestFastRF, TestFastSchNet])
def test_gravity_is_right_for_every_backbone(suite: type[MessagePassingSuite]) -> None:
    model, graph = suite().model(gravity=[0.0, -9.81, 0.0]), make_graph(30, 2)
    for found, wanted in zip(model(graph), suite().reference(model, graph), strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)
    assert not torch.allclose(found, suite().model()(graph)[1], atol=1e-3)


def test_gaussians_and_cosine_are_their_formulas() -> None:
    basis, cutoff = 6, 0.8
    distances = [0.0, 0.05, 0.31, 0.8, 1.3]
    rows = torch.tensor(distances, dtype=torch.float64)[:, None]
    seen, end = schnet.gaussians(rows, basis, cutoff), schnet.cosine_cutoff(rows, cutoff)
    for d, row, c in zip(distances, seen.tolist(), end[:, 0].tolist(), strict=True):
        centres = [cutoff * k / (basis - 1) for k in range(basis)]
        assert row == pytest.approx([math.exp(-((d - mu) ** 2) / (2 * 0.16**2)) for mu in centres], abs=1e-14)
        assert c == pytest.approx((math.cos(math.pi * d / cutoff) + 1) / 2 if d < cutoff else 0.0, abs=1e-14)
    assert schnet.gaussians(rows, 1, cutoff).shape == (5, 1)  # one alone is as wide as the cutoff
    assert schnet.gaussians(rows, 1, cutoff)[3] == pytest.approx(math.exp(-0.5))


def test_beyond_the_cutoff_schnet_says_nothing() -> None:
    """What a node learns of another, h, ends there smoothly, for filters of any weights."""
    torch.manual_seed(0)
    layer = network.SchNet(3, hidden=8, layers=2, cutoff=0.5).double().layers[0]
    x = torch.zeros(4, 3, dtype=torch.float64)
    x[:, 0] = torch.tensor([0.3, 0.5 - 1e-6, 0.5 + 1e-6, 2.0])

    class Edges:
        dst: ClassVar = {"x": x}
        src: ClassVar = {"x": torch.zeros_like(x), "q": torch.randn(4, 8, dtype=torch.float64)}
        data: ClassVar = {"e": torch.rand(4, 2, dtype=torch.float64)}

    said = layer.message(Edges())["m"].abs().amax(1)
    assert said[0] > 1e-3
    assert 0 < said[1] < 1e-9
    assert (said[2:] == 0).all()


@pytest.mark.parametrize("name", ["RF", "SchNet"])
def test_edge_attributes_are_read(name: str) -> None:
    suite = {"RF": TestRF, "SchNet": TestSchNet}[name]()
    graph = make_graph(20, 3)
    with torch.no_grad():
        before = suite.model()(graph)[0]
        graph.edata["e"][:, 1] += 1.0
        assert float((suite.model()(graph)[0] - before).abs().max()) > 1e-4


def test_virtual_nodes_without_features_part() -> None:
    """All start at the centroid; a bias of their own is all that tells those of FastRF apart."""
    model, graph = TestFastRF().model(layers=1), make_graph(30, 4)
    with torch.no_grad():
        moved = model(graph)[1][0] - graph.ndata["x"].mean(0)
        assert float(torch.pdist(moved).min()) > 0.05 * float(moved.norm(dim=1).max()) > 1e-7
        torch.nn.init.zeros_(model.layers[0].virtual.bias)
        together = model(graph)[1][0]
        assert float(torch.pdist(together).max()) == 0.0  # the control


def test_the_cutoff_is_the_data_radius_unless_told() -> None:
    defaults = asdict(config.Model())

    def options(*overrides: str, radius: float) -> dict[str, Any]:
        given = config.load(None, ["model.name=FastSchNet", *overrides]).model
        return network.resolve_model(asdict(given), defaults, radius)[1]

    assert options(radius=0.075)["cutoff"] == 0.075
    assert options(radius=math.inf)["cutoff"] == 10.0
    assert options("model.cutoff=3", radius=0.075)["cutoff"] == 3.0
    assert options("model.basis=50", radius=1.0)["basis"] == 50
    for name in ("EGNN", "FastRF"):
        for key in ("basis=7", "cutoff=2.0"):
            with pytest.raises(Failure, match=rf"model\.{key}: {name} has no such option"):
                network.resolve_model(
                    asdict(config.load(None, [f"model.name={name}", f"model.{key}"]).model), defaults, radius=1.0
                )


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("recipes/*/config.yaml")), ids=lambda p: p.parent.name
)
def test_every_recipe_takes_every_model(path: Path) -> None:
    for name in network.MODELS:
        given = config.load(path, [f"model.name={name}", "model.hidden=8", "model.layers=1"])
        model = trainer.build_model(given, (3, len(given.data.node_attributes)), SingleProcess())
        assert type(model).__name__ == name


@pytest.mark.parametrize("value", ["0", "-1", ".inf", ".nan"])
def test_a_cutoff_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(Failure, match=r"model\.cutoff=.*must be positive and finite"):
        config.load(None, [f"model.cutoff={value}"])


def test_the_comment_on_names_knows_every_model() -> None:
    (line,) = (line for line in config.to_yaml(config.Config()).splitlines() if line.strip().startswith("name: "))
    for name in network.MODELS:
        assert name in line


class OfThePaper(EGNNSuite):
    name = "FastEGNN"
    options: ClassVar = {"hidden": 5, "layers": 2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"virtual_nodes": 1, "normalize": True},
        {"attention": True},
        {"tanh": True, "gravity": [0.1, -9.81, 2.0]},
        {"virtual_nodes": 4, "normalize": True, "attention": True, "tanh": True, "gravity": [0.0, -9.81, 0.0]},
    ],
    ids=["plain", "normalize, C = 1", "attention", "tanh and gravity", "every option"],
)
def test_fast_egnn_is_the_papers_formulas_in_numpy(options: dict[str, Any]) -> None:
    model, graph = OfThePaper().model(**options), make_graph(9, 5, radius=0.6)
    graph.ndata["x"][4] = graph.ndata["x"][3]  # two nodes at one place
    graph.edata["e"] = torch.rand(graph.num_edges(), 2, dtype=torch.float64)  # not its lengths: any invariants will do
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    src, dst = graph.edges()
    edges = list(zip(src.tolist(), dst.tolist(), graph.edata["e"].numpy(), strict=True))
    assert len(edges) > 20
    fields = {name: graph.ndata[name].numpy() for name in "xvfa"}
    on = {"normalize": options.get("normalize", False), "tanh": options.get("tanh", False), "g": options.get("gravity")}
    x, z = slow.fast_egnn(weights, len(model.layers), fields, edges, **on)
    with torch.no_grad():
        found = [t.numpy() for t in model(graph)]
    scale = max(1.0, np.abs(x).max())
    assert np.abs(found[0] - x).max() <= 1e-12 * scale
    assert np.abs(found[1][0] - z).max() <= 1e-12 * scale
    assert np.abs(x - graph.ndata["x"].numpy()).max() > 1e-2
