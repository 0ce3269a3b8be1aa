"""A trained model as a function of arrays: what ``dist_egnn.load`` returns. See docs/inference.md.

Legend: N nodes, F features, K node attributes, C virtual nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import config as configs
from ..data.dataset import sample_spec
from ..data.samples import build_sample, feature_columns
from ..data.trajectories import box_sides
from ..distributed.comm import SingleProcess
from ..errors import Failure
from ..train import checkpoint
from ..train.trainer import build_model
from ..utils import devices

Array = np.ndarray | Tensor
ByName = Mapping[str, Array]


class Predictor:
    """Positions after the run's horizon, predicted from one snapshot of the kind that the run was trained on.

    All that a sample needs is made as the run's data section says: features (``speed``, ``NAME/max``), the radius graph, edge
    dropping, edge attributes. A model that was trained on parts sees the whole graph here, on one process, no edge cut.

    config: the run's; features: names of its input features, None where the run took every attribute and speed.
    """

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        """path: a run's folder, whose best.pt is taken, or a checkpoint. Raises Failure for what cannot be read."""
        devices.check_name(device, "device=", "auto")
        if device != "auto":
            devices.check_available(device, "device=")
        file = Path(path)
        file = file / "best.pt" if file.is_dir() else file
        state = checkpoint.load(file)
        self.config = configs.parse(state["config"], f"{file}: its config")
        data = self.config.data
        embedding = state["model"].get("embedding.weight")  # none: the model reads no features
        self.width = 0 if embedding is None else embedding.shape[1]
        self.features = () if embedding is None else data.features
        self.node_attributes = () if embedding is None else tuple(data.node_attributes)
        self.spec = sample_spec(data, ())
        with torch.random.fork_rng(devices=[]):  # the caller's draws are none of our business
            self.model = build_model(self.config, (self.width, len(self.node_attributes)), SingleProcess())
        checkpoint.load_weights(self.model, state, file)
        self.model.to(devices.resolve(device)).eval()

    def __call__(
        self,
        positions: Array,
        velocities: Array,
        features: ByName | Array | None = None,
        *,
        node_attributes: ByName | Array | None = None,
        box: Array | None = None,
    ) -> Array:
        """Predicted positions (N, 3) float32: an array for an array of positions, a tensor on its device for a tensor.

        positions, velocities: (N, 3), in the units of the run's data; features: attributes by name, each (N,), of which the run's
        input features and node attributes are made; or the features themselves (N, F). node_attributes: the same for (N, K),
        where they are not among the features. box: low and high corner (2, 3), if the run's data are periodic.
        Raises Failure for a wrong shape, what is missing, NaN and infinite values.
        """
        return self.with_virtual(positions, velocities, features, node_attributes=node_attributes, box=box)[0]

    def with_virtual(
        self,
        positions: Array,
        velocities: Array,
        features: ByName | Array | None = None,
        *,
        node_attributes: ByName | Array | None = None,
        box: Array | None = None,
    ) -> tuple[Array, Array]:
        """The same, and the positions of the virtual nodes (C, 3) after the last layer."""
        x = _numbers(positions, "positions", (None, 3))
        n = len(x)
        v = _numbers(velocities, "velocities", (n, 3))

        def field(given: ByName | Array, names: Sequence[str], width: int, what: str) -> np.ndarray:
            if not isinstance(given, Mapping):
                return _numbers(given, what, (n, width))
            return feature_columns(names, v, lambda name: _named(given, name, what, n))

        given = {} if features is None else features
        named: ByName = given if isinstance(given, Mapping) else {}
        f = field(given, self._names(named) if given is named else (), self.width, "features")
        a_given = named if node_attributes is None else node_attributes
        a = field(a_given, self.node_attributes, len(self.node_attributes), "node_attributes")
        side = None if box is None else box_sides(_numbers(box, "box", (2, 3)))
        with torch.no_grad():
            predicted, z = self.model(build_sample({"x": x, "v": v, "f": f, "a": a}, self.spec, side))
        if isinstance(positions, Tensor):
            return predicted.to(positions.device), z[0].to(positions.device)
        return predicted.cpu().numpy(), z[0].cpu().numpy()

    def _names(self, given: ByName) -> tuple[str, ...]:
        """The input features in the model's order."""
        if self.features is not None:
            return tuple(self.features)
        names = (*sorted(given), "speed")  # what data.features: null means
        if len(names) != self.width:
            raise Failure(
                f"features: the model takes every attribute of its data, {self.width - 1}, and speed; "
                f"given are {len(given)}: {', '.join(sorted(given)) or 'none'}"
            )
        return names


def _named(given: ByName, name: str, what: str, n: int) -> np.ndarray:
    """A node attribute (N,) from those given by name."""
    if name not in given:
        have = ", ".join(sorted(given)) or "none"
        raise Failure(f"{what}: '{name}' is missing; give it by name, {{'{name}': array of {n}}} (given: {have})")
    return _numbers(given[name], f"{what}: '{name}'", (n,))


def _numbers(value: Any, what: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """A float32 copy, as files keep numbers. Raises Failure for another shape (None: any length), no numbers, NaN, infinity."""
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    try:
        with np.errstate(over="ignore"):
            array = np.array(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise Failure(f"{what}: not an array of numbers ({error})") from error
    wanted = ", ".join("N" if size is None else str(size) for size in shape)
    if array.ndim != len(shape) or any(s not in (None, t) for s, t in zip(shape, array.shape, strict=True)):
        raise Failure(f"{what}: shape {array.shape}, expected ({wanted}{',' if len(shape) == 1 else ''})")
    if not len(array):
        raise Failure(f"{what}: no node")
    if not np.isfinite(array).all():
        raise Failure(f"{what}: NaN or infinite at row {int(np.argwhere(~np.isfinite(array))[0][0])}")
    return array
