"""The baselines as the authors ran them: the suite of every model, and their formulas in numpy, node by node."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy import ndarray as Array
from numpy_fast_egnn import mean, perceptron
from test_models import MessagePassingSuite, make_graph, needs_native

from dist_egnn import config
from dist_egnn.errors import Failure
from dist_egnn.models import network, published_baselines, resolve

Weights = dict[str, Array]
Incoming = list[list[tuple[int, Array]]]  # of each node: the source and the attributes of each in-edge
MODULE = "dist_egnn.models.published_baselines"


class TestPublishedEGNN(MessagePassingSuite):
    name = f"{MODULE}:PublishedEGNN"
    options: ClassVar = {"hidden": 8, "layers": 3}


@needs_native
class TestNativePublishedEGNN(MessagePassingSuite):
    name = f"{MODULE}:PublishedEGNN"
    options: ClassVar = {"hidden": 16, "layers": 2, "engine": "native"}


class TestPublishedRF(MessagePassingSuite):
    name = f"{MODULE}:PublishedRF"
    options: ClassVar = {"hidden": 8, "layers": 3}


class TestPublishedSchNet(MessagePassingSuite):
    name = f"{MODULE}:PublishedSchNet"
    options: ClassVar = {"hidden": 8, "layers": 3, "cutoff": 0.2}  # a part of the edges is longer


def egnn(w: Weights, x: Array, v: Array, h: Array, incoming: Incoming) -> tuple[Array, Array]:
    x_new, h_new = x.copy(), h.copy()
    for i, edges in enumerate(incoming):
        pushes, messages = [], []
        for j, e in edges:
            r = x[i] - x[j]
            m = perceptron(w, "phi_e", [h[i], h[j], float(r @ r), e], end=True)
            messages.append(m)
            pushes.append(r * (perceptron(w, "phi_x", [m]) + w["bias"]))
        x_new[i] += perceptron(w, "phi_v", [h[i]]) * v[i] + np.clip(mean(pushes, x[i]), -100, 100)
        h_new[i] = perceptron(w, "phi_h", [h[i], mean(messages, h[i])])
    return x_new, h_new


def rf(w: Weights, x: Array, v: Array, h: Array, incoming: Incoming) -> tuple[Array, Array]:
    x_new = x.copy()
    for i, edges in enumerate(incoming):
        pushes = []
        for j, e in edges:
            r = x[i] - x[j]
            pushes.append(r * np.tanh(perceptron(w, "phi_x", [np.linalg.norm(r), e])))
        x_new[i] += mean(pushes, x[i]) + perceptron(w, "phi_v", [np.linalg.norm(v[i])]) * v[i]
    return x_new, h


def schnet(w: Weights, x: Array, v: Array, h: Array, incoming: Incoming, cutoff: float = 0.2) -> tuple[Array, Array]:
    def linear(name: str, a: Array) -> Array:
        return w[f"{name}.weight"] @ a + w.get(f"{name}.bias", 0.0)

    def ssp(a: Array) -> Array:
        return np.log(0.5 * np.exp(a) + 0.5)

    centres, x_new, h_new = np.linspace(0, cutoff, 50), x.copy(), h.copy()
    for i, edges in enumerate(incoming):
        pushes, total = [], np.zeros(128)
        for j, e in edges:
            d = e[0]  # at the input positions
            g = np.exp(-0.5 * ((d - centres) / centres[1]) ** 2)
            pushes.append((x[i] - x[j]) * linear("phi_x", np.concatenate([g, h[i], h[j]])))
            cosine = 0.5 * (math.cos(math.pi * d / cutoff) + 1)
            total += linear("sender", h[j]) * linear("filter_out", ssp(linear("filter_in", g))) * cosine
        x_new[i] += mean(pushes, x[i])
        h_new[i] += linear("out", ssp(linear("receiver", total)))
    return x_new, h_new


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (published_baselines.PublishedEGNN, egnn),
        (published_baselines.PublishedRF, rf),
        (published_baselines.PublishedSchNet, schnet),
    ],
)
def test_outputs_are_those_of_the_formulas_in_numpy(kind: Any, layer: Any) -> None:
    torch.manual_seed(0)
    options = {"cutoff": 0.2} if layer is schnet else {}
    model, graph = kind(3, hidden=6, layers=3, **options).double(), make_graph(20, 5, radius=0.6)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    incoming: Incoming = [[] for _ in range(20)]
    for j, i, e in zip(*(end.tolist() for end in graph.edges()), graph.edata["e"].numpy(), strict=True):
        incoming[i].append((j, e))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    x, v, f = (graph.ndata[name].numpy() for name in "xvf")
    start = x
    h = f @ weights["embedding.weight"].T + weights["embedding.bias"] if layer is not rf else f
    for k in range(3):
        own = f"layers.{k}."
        w = {name.removeprefix(own): value for name, value in weights.items() if name.startswith(own)}
        x, h = layer(w, x, v, h, incoming)
    with torch.no_grad():
        result = model(graph)[0].numpy()
    assert 0.01 < np.abs(x - start).max() < 10
    assert np.abs(result - x).max() < 1e-10


def test_the_mean_push_is_clamped_at_100() -> None:
    model, graph = TestPublishedEGNN().model(layers=1), make_graph(20, 1)
    with torch.no_grad():
        model.layers[0].bias.fill_(1e4)
        model.layers[0].phi_v[2].weight.zero_()
        model.layers[0].phi_v[2].bias.zero_()
        moved = (model(graph)[0] - graph.ndata["x"]).abs()
    assert float(moved.max()) == pytest.approx(100, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("EGNN", ["model.normalize=true"], {"hidden": 64, "layers": 4}),
        ("RF", ["model.normalize=true", "model.layers=2"], {"layers": 2}),
        ("SchNet", ["model.normalize=true", "model.layers=2", "model.basis=9"], {"cutoff": 1.0}),
        ("SchNet", ["data.radius=0.035"], {"cutoff": 0.035}),
        ("FastEGNN", ["model.normalize=true"], {"normalize": True}),
    ],
)
def test_the_option_selects_the_published_form(name: str, keys: list[str], expected: dict[str, Any]) -> None:
    settings = config.load(None, [f"model.name={name}", "model.as_published=true", *keys])
    cls, options = resolve.resolve_model(asdict(settings.model), asdict(config.Model()), settings.data.radius)
    assert cls.__name__ == (name if name == "FastEGNN" else f"Published{name}")
    assert {key: options[key] for key in expected} == expected
    assert name == "FastEGNN" or "normalize" not in options
    model = cls(3, **options)
    assert name != "SchNet" or len(model.layers) == 6


def test_options_that_the_published_form_lacks_are_refused() -> None:
    settings = config.load(None, ["model.name=EGNN", "model.as_published=true", "model.attention=true"])
    with pytest.raises(Failure, match=r"model\.attention=True: PublishedEGNN"):
        resolve.resolve_model(asdict(settings.model), asdict(config.Model()), 1.0)
    assert network.MODELS["EGNN"] is network.EGNN  # the default
