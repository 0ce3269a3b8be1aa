"""The settings a store was made with, and their comparison with a config. Imports neither torch nor DGL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Data
from ..errors import Failure

# inputs that manifests of older stores lack, and the values those stores were made with
DEFAULT_INPUTS: dict[str, Any] = {"periodic": False, "trainers": 1, "weights": None, "fixed": "", "widths": None}
DEFAULT_INPUTS |= {"history": 0, "walls": "none", "gravity": None, "pushforward": 0}
DEFAULT_INPUTS |= {"velocity": "forward", "velocity_scale": 1.0}
COMPARED = (
    *("radius", "horizon", "features", "node_attributes", "edge_drop", "periodic"),
    *("velocity", "velocity_scale", "history", "walls", "gravity", "pushforward"),
    *("fixed", "frames", "first_frame", "last_frame", "frame_seed"),
)


def store_widths(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Columns F and K of the fields f and a; in most stores each name is one column."""
    f, a = inputs.get("widths") or (len(inputs["features"]), len(inputs["node_attributes"]))
    return f, a


def check_settings(inputs: Mapping[str, Any], path: str, data: Data) -> None:
    """Raise Failure if the config's data section differs from the inputs of the store at this path."""
    for name in COMPARED:
        value = getattr(data, name)
        if value != inputs[name] and not (name in ("features", "velocity_scale") and value is None):
            stored = f"{path} was made with {inputs[name]}"
            raise Failure(f"data.{name}={value} in the config, but {stored}; set it to that or partition again")
