"""A trained model as a function of arrays: what ``dist_egnn.load`` returns. See docs/inference.md.

Legend: N nodes, F features, K node attributes, C virtual nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .. import config as configs
from ..config import Partition
from ..data import checks
from ..data.dataset import sample_spec
from ..data.fixed_nodes import fixed_nodes
from ..data.graphs import Edges
from ..data.identity import resolve_features
from ..data.samples import build_sample, feature_columns
from ..data.trajectories import both_directions, box_sides
from ..distributed.comm import Comm, SingleProcess
from ..errors import Failure
from ..train import checkpoint, run_dir
from ..train.trainer import build_model
from ..utils import devices

Array = np.ndarray | Tensor
ByName = Mapping[str, Array]
Given = ByName | Array | None


class Predictor:
    """Predicts positions after the run's horizon from one snapshot, on one process and the whole graph.

    path: a run's folder, whose best.pt is loaded, or a checkpoint. Features (``speed``, ``NAME/max``), radius graph,
    edge dropping and edge attributes follow ``config.data``. comm: the processes that share the model's graphs;
    double: compute in float64, to compare numbers of processes. Raises Failure if the checkpoint cannot be loaded.
    """

    def __init__(
        self, path: str | Path, device: str = "cpu", comm: Comm | None = None, *, double: bool = False
    ) -> None:
        devices.check_name(device, "device=", "auto")
        if device != "auto":
            devices.check_available(device, "device=")
        file = run_dir.weights_file(path)
        state = checkpoint.load(file)
        self.config = configs.parse(state["config"], f"{file}: its config")
        self.config.partition = Partition(halo="exchange")  # exact for any number of processes
        data = self.config.data
        if data.history:
            raise Failure(f"{file}: a simulator (data.history), not a function of one snapshot; use `distegnn rollout`")
        embedding = state["model"].get("embedding.weight")  # missing: the model uses no features
        self.width = 0 if embedding is None else embedding.shape[1]
        features = resolve_features(data, state.get("data"))
        self.features, self.node_attributes = ([], []) if embedding is None else (features, data.node_attributes)
        self.spec = sample_spec(data, ())
        with torch.random.fork_rng(devices=[]):  # keeps the caller's random state
            width = len(self.node_attributes)
            self.attribute_width = width and state.get("widths", (0, width))[1]
            self.model = build_model(self.config, (self.width, self.attribute_width), comm or SingleProcess())
        checkpoint.load_weights(self.model, state, file)
        place = devices.resolve(device, comm.rank if comm else 0)
        if comm:
            comm.use_device(place, "auto")
        self.model.to(place).eval()
        if double:
            self.model.double()

    def __call__(
        self,
        positions: Array,
        velocities: Array,
        features: Given = None,
        *,
        node_attributes: Given = None,
        box: Array | None = None,
        edges: Array | None = None,
    ) -> Array:
        """The predicted positions alone; for the arguments see `with_virtual`."""
        more: dict[str, Any] = {"node_attributes": node_attributes, "box": box, "edges": edges}
        return self.with_virtual(positions, velocities, features, **more)[0]

    def with_virtual(
        self,
        positions: Array,
        velocities: Array,
        features: Given = None,
        *,
        node_attributes: Given = None,
        box: Array | None = None,
        edges: Array | None = None,
    ) -> tuple[Array, Array]:
        """Predicted positions (N, 3) float32, and those of the virtual nodes (C, 3) after the last layer.

        Both are float64 for float64 positions so far from zero that float32 would lose digits.

        positions, velocities: (N, 3) in the data's units; arrays, or tensors for tensors on their device. features:
        attributes (N,) or (N, k) by name, or the run's features (N, F). node_attributes: the same, (N, K), if
        ``features`` lacks them.
        box: low and high corner (2, 3) of data that are periodic in all directions; edges: pairs of nodes (E, 2) for
        data.edges=given. Raises Failure for wrong shapes and names, NaN and infinity.
        """
        x, shift = _near_zero(positions)
        v = _numbers(velocities, "velocities", (len(x), 3)) * np.float32(self.spec.velocity_scale)
        features = {} if features is None else features
        if node_attributes is None:
            node_attributes = features if isinstance(features, Mapping) else {}
        f = _columns("features", features, self.features, self.width, v, self.spec.velocity_scale)
        a = _columns("node_attributes", node_attributes, self.node_attributes, self.attribute_width, v)
        fixed = self._fixed(features, node_attributes, len(x))
        side = None
        if box is not None:
            checks.check_box(corners := _numbers(box, "box", (2, 3)), "box")
            side = box_sides(corners)
        given = None if edges is None else both_directions(checks.edge_pairs(edges, "edges", len(x)))
        predicted, z = self.predict({"x": x, "v": v, "f": f, "a": a}, side, given)
        results = torch.where(fixed, torch.from_numpy(x).to(predicted), predicted), z
        if shift is not None:  # the model is equivariant: it moves with the nodes
            results = results[0].double() + shift, results[1].double() + shift
        if isinstance(positions, Tensor):
            return results[0].to(positions.device), results[1].to(positions.device)
        return results[0].numpy(), results[1].numpy()

    def predict(
        self, fields: Mapping[str, np.ndarray], side: np.ndarray | None, given: Edges | None
    ) -> tuple[Tensor, Tensor]:
        """The model's positions (N, 3) and z (C, 3), on the CPU, from fields x, v, f, a (N, …)."""
        with torch.no_grad():
            predicted, z = self.model(build_sample(fields, self.spec, side, given=given))
        return predicted.cpu(), z[0].cpu()

    def close(self) -> None:
        """End the predictor's processes, if it has any. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fixed(self, features: Given, node_attributes: Given, n: int) -> Tensor:
        """The nodes (N, 1) bool that data.fixed names, from attributes given by name."""
        if not (fixed := self.spec.fixed):
            return torch.zeros(n, 1, dtype=torch.bool)
        given: dict[str, Array] = {}
        for named in (node_attributes, features):
            given |= named if isinstance(named, Mapping) else {}
        name = fixed.partition("=")[0]
        return torch.from_numpy(fixed_nodes(fixed, lambda _: _attribute("features", given, name, n))).unsqueeze(1)


def _attribute(what: str, given: ByName, name: str, n: int) -> np.ndarray:
    """The attribute (N,) or (N, k) of this name. Raises Failure if it is not among those given."""
    if name not in given:
        listed = ", ".join(sorted(given)) or "none"
        raise Failure(f"{what}: '{name}' is missing; pass {{'{name}': array of {n}}} (given: {listed})")
    return _numbers(given[name], f"{what}: '{name}'", (n, None) if np.ndim(given[name]) == 2 else (n,))


def feature_factors(what: str, names: Sequence[str] | None, width: int, scale: float) -> np.ndarray:
    """(width,) float32 factors of features that are given as an array: ``scale`` for speed, 1 for the others."""
    factors, names = np.ones(width, np.float32), ["speed"] if names is None else names
    if scale != 1 and "speed" in names:
        if len(names) != width and names != ["speed"]:
            raise Failure(f"{what}: an attribute of several columns beside speed; pass attributes by name")
        factors[width - len(names) + names.index("speed")] = scale
    return factors


def _columns(
    what: str, given: ByName | Array, names: Sequence[str] | None, width: int, v: np.ndarray, scale: float = 1.0
) -> np.ndarray:
    """The columns (N, width) of these names, or as given. names: None if the model uses all attributes and speed.

    v: (N, 3), multiplied by ``scale`` already, as 'speed' in a given array is not.
    """
    n = len(v)
    if not isinstance(given, Mapping):
        return _numbers(given, what, (n, width)) * feature_factors(what, names, width, scale)
    listed = ", ".join(sorted(given)) or "none"
    listed_names = names is not None
    if names is None:
        names = (*sorted(given), "speed")
    columns = feature_columns(names, v, lambda name: _attribute(what, given, name, n))
    if columns.shape[1] != width:
        used = f"columns ({', '.join(names)})" if listed_names else "columns: all attributes of its data and speed"
        raise Failure(f"{what}: the model uses {width} {used}; given are {columns.shape[1]} columns of {listed}")
    return columns


def _near_zero(positions: Array) -> tuple[np.ndarray, Tensor | None]:
    """Positions (N, 3) float32, and what was subtracted (3,) float64: None unless float32 would lose digits."""
    x = _numbers(positions, "positions", (None, 3))
    whole = positions.detach().cpu().numpy() if isinstance(positions, Tensor) else np.asarray(positions)
    if whole.dtype != np.float64 or not checks.lost_digits(whole):
        checks.check_digits(x, "positions")
        return x, None
    shift = np.rint(whole.mean(0))
    return _numbers(whole - shift, "positions", (None, 3)), torch.from_numpy(shift)


def _numbers(value: Any, what: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """A float32 copy. Raises Failure for another shape (None: any length), no numbers, NaN and infinite values."""
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    array = checks.numbers(value, what, shape, "N")
    if not len(array):
        raise Failure(f"{what}: no node")
    return array
