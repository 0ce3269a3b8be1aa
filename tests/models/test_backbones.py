"""RF and SchNet, with and without virtual nodes: the suite of every model; FastEGNN against its numpy version."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import numpy_fast_egnn
import pytest
import reference
import torch
from dgl import DGLGraph
from test_models import EGNNSuite, MessagePassingSuite, make_graph
from torch import Tensor

from dist_egnn import config
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.models import network, resolve, schnet
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
def test_gravity_equals_the_reference(suite: type[MessagePassingSuite]) -> None:
    model, graph = suite().model(gravity=[0.0, -9.81, 0.0]), make_graph(30, 2)
    (x, z), (x_expected, z_expected) = model(graph), suite().reference(model, graph)
    assert torch.allclose(x, x_expected, atol=1e-12)
    assert torch.allclose(z, z_expected, atol=1e-12)
    assert not torch.allclose(z, suite().model()(graph)[1], atol=1e-3)


def test_a_single_gaussian_is_as_wide_as_the_cutoff() -> None:
    values = schnet.gaussians(torch.tensor([[0.0], [0.8]], dtype=torch.float64), 1, 0.8)
    assert values.tolist() == [[1.0], [pytest.approx(math.exp(-0.5))]]


def test_schnet_messages_end_smoothly_at_the_cutoff() -> None:
    torch.manual_seed(0)
    layer = network.SchNet(3, hidden=8, layers=2, cutoff=0.5).double().layers[0]
    x = torch.zeros(4, 3, dtype=torch.float64)
    x[:, 0] = torch.tensor([0.3, 0.5 - 1e-6, 0.5 + 1e-6, 2.0])
    src = {"x": torch.zeros_like(x), "q": torch.randn(4, 8, dtype=torch.float64)}
    edges = SimpleNamespace(dst={"x": x}, src=src, data={"e": torch.rand(4, 2, dtype=torch.float64)})
    size = layer.message(edges)["m"].abs().amax(1)
    assert size[0] > 1e-3
    assert 0 < size[1] < 1e-9
    assert (size[2:] == 0).all()


def test_virtual_nodes_without_features_separate() -> None:
    """All start at the centroid; in FastRF only their own bias tells them apart."""
    model, graph = TestFastRF().model(layers=1), make_graph(30, 4)
    with torch.no_grad():
        displacement = model(graph)[1][0] - graph.ndata["x"].mean(0)
        assert float(torch.pdist(displacement).min()) > 0.05 * float(displacement.norm(dim=1).max()) > 1e-7
        torch.nn.init.zeros_(model.layers[0].virtual.bias)
        assert float(torch.pdist(model(graph)[1][0]).max()) == 0.0  # the control


def test_the_default_cutoff_is_the_radius_of_the_data() -> None:
    defaults = asdict(config.Model())

    def options(name: str, *overrides: str, radius: float = 1.0) -> dict[str, Any]:
        settings = config.load(None, [f"model.name={name}", *overrides]).model
        return resolve.resolve_model(asdict(settings), defaults, radius)[1]

    assert options("FastSchNet", radius=0.075)["cutoff"] == 0.075
    assert options("FastSchNet", radius=math.inf)["cutoff"] == 10.0
    assert options("FastSchNet", "model.cutoff=3", radius=0.075)["cutoff"] == 3.0
    assert options("FastSchNet", "model.basis=50")["basis"] == 50
    for name, key in itertools.product(("EGNN", "FastRF"), ("model.basis=7", "model.cutoff=2.0")):
        with pytest.raises(Failure, match=rf"{re.escape(key)}: {name}"):
            options(name, key)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("recipes/*/config.yaml")), ids=lambda p: p.parent.name
)
def test_every_recipe_takes_every_model(path: Path) -> None:
    for name in network.MODELS:
        settings = config.load(path, [f"model.name={name}", "model.hidden=8", "model.layers=1"])
        model = trainer.build_model(settings, (3, len(settings.data.node_attributes)), SingleProcess())
        assert type(model).__name__ in (name, f"Published{name}")


@pytest.mark.parametrize(
    "key", [*(f"cutoff={value}" for value in ("0", "-1", ".inf", ".nan")), "channels=0", "basis=0"]
)
def test_options_out_of_range_are_refused(key: str) -> None:
    with pytest.raises(Failure, match=rf"model\.{key.split('=')[0]}="):
        config.load(None, [f"model.{key}"])


def test_the_comment_on_model_name_lists_every_model() -> None:
    (line,) = (line for line in config.to_yaml(config.Config()).splitlines() if line.strip().startswith("name: "))
    assert all(name in line for name in network.MODELS)


class PaperFastEGNN(EGNNSuite):
    name = "FastEGNN"
    options: ClassVar = {"hidden": 5, "layers": 2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"virtual_nodes": 1, "normalize": True},
        {"attention": True, "virtual_messages": "concat"},
        {"tanh": True, "gravity": [0.1, -9.81, 2.0]},
        {"virtual_nodes": 4, "normalize": True, "attention": True, "tanh": True, "gravity": [0.0, -9.81, 0.0]},
    ],
    ids=["plain", "normalize, C = 1", "attention, all messages", "tanh and gravity", "every option"],
)
def test_fast_egnn_is_the_papers_formulas_in_numpy(options: dict[str, Any]) -> None:
    model, graph = PaperFastEGNN().model(**options), make_graph(9, 5, radius=0.6)
    graph.ndata["x"][4] = graph.ndata["x"][3]  # coincident nodes
    graph.edata["e"] = torch.rand(graph.num_edges(), 2, dtype=torch.float64)  # any invariants, not the lengths
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    src, dst = graph.edges()
    edges = list(zip(src.tolist(), dst.tolist(), graph.edata["e"].numpy(), strict=True))
    assert len(edges) > 20
    fields = {name: graph.ndata[name].numpy() for name in "xvfa"}
    on = {"normalize": options.get("normalize", False), "tanh": options.get("tanh", False), "g": options.get("gravity")}
    on["combine"] = np.concatenate if options.get("virtual_messages") == "concat" else None
    x, z = numpy_fast_egnn.fast_egnn(weights, len(model.layers), fields, edges, **on)
    with torch.no_grad():
        x_model, z_model = (t.numpy() for t in model(graph))
    scale = max(1.0, np.abs(x).max())
    assert np.abs(x_model - x).max() <= 1e-12 * scale
    assert np.abs(z_model[0] - z).max() <= 1e-12 * scale
    assert np.abs(x - graph.ndata["x"].numpy()).max() > 1e-2
