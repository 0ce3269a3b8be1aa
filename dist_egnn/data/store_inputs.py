"""The settings a store was made with, and their comparison with a config. Imports neither torch nor DGL."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import Data, follows_from_data
from ..errors import Failure

# inputs that manifests of older stores lack, and the values those stores were made with
DEFAULT_INPUTS: dict[str, Any] = {"periodic": False, "trainers": 1, "weights": None, "fixed": "", "widths": None}
DEFAULT_INPUTS |= {"history": 0, "walls": "none", "gravity": None, "pushforward": 0}
DEFAULT_INPUTS |= {"velocity": "forward", "velocity_scale": 1.0, "edges": "radius", "neighbours": 0}
COMPARED = (
    *("edges", "neighbours", "radius", "horizon", "features", "node_attributes", "edge_drop", "periodic"),
    *("velocity", "velocity_scale", "history", "walls", "gravity", "pushforward"),
    *("fixed", "frames", "first_frame", "last_frame", "frame_seed"),
)


def store_widths(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Columns F and K of the fields f and a; in most stores each name is one column."""
    f, a = inputs.get("widths") or (len(inputs["features"]), len(inputs["node_attributes"]))
    return f, a


def node_floats(inputs: Mapping[str, Any]) -> int:
    """float32 numbers of a node's fields (an int64 is two), without gid: x, v, y, f, a, past, moving_id and moving."""
    past = inputs.get("history", 0) + inputs.get("pushforward", 0)
    return 9 + sum(store_widths(inputs)) + 3 * max(past - 1, 0) + 4 * bool(inputs.get("fixed"))


def check_settings(inputs: Mapping[str, Any], path: str, data: Data) -> None:
    """Raise Failure if the config's data section differs from the inputs of the store at this path."""
    for name in COMPARED:
        value = getattr(data, name)
        if value != inputs[name] and not follows_from_data(data, name):
            stored = f"{path} was made with {inputs[name]}"
            changes = {"velocity_scale": data.velocity_scale, name: value}
            raise Failure(
                f"data.{name}={value} in the config, but {stored}; set it to that, or {another(path, inputs, **changes)}"
            )


def partition_command(path: str | Path, inputs: Mapping[str, Any]) -> str:
    """The command that makes a store of these inputs at ``path``."""
    words = ["distegnn", "partition", inputs["source"], "--out", str(path)]
    for option, name in (("parts", "parts"), ("trainers", "trainers"), ("method", "method"), ("seed", "method_seed")):
        words += [f"--{option}", str(inputs[name])]
    words += ["--shard-nodes", str(inputs["shard_nodes"])]
    words += ["--weights", ",".join(map(str, inputs["weights"]))] if inputs["weights"] else []
    default = Data()
    for name in (field.name for field in fields(Data) if field.name in inputs):
        if (value := inputs[name]) != getattr(default, name):
            text = f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
            words.append(f"data.{name}={text}")
    return shlex.join(words)


def remake(path: Path, inputs: Mapping[str, Any] | None = None) -> str:
    """The two commands that replace a damaged store; without its inputs the second one is known to its author only."""
    remove = f"run `{shlex.join(['rm', '-r', str(path)])}`, then"
    if inputs is None:
        return f"{remove} the `distegnn partition … --out {path}` that made it"
    return f"{remove} `{partition_command(path, inputs)}`"


def another(path: str | Path, inputs: Mapping[str, Any], **changes: Any) -> str:
    """The command that makes a second store beside the one at ``path``, with other inputs."""
    new = Path(path).with_name(Path(path).name + "-2")
    return f"make another store: `{partition_command(new, DEFAULT_INPUTS | dict(inputs) | changes)}`"
