"""FastEGNN weights of the authors' code: read from a file without running code from it, and renamed to ours.

Legend: H width, L layers, C virtual nodes, F input features, K node attributes, A edge attributes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from ..errors import Failure

# before 2.6 a file could run code all the same (CVE-2025-32434), before 2.10 corrupt memory (CVE-2026-24747)
SAFE = Version("2.10")
MARKS = ("virtual_node_feat", "embedding_in.weight")  # what tells a state dict from what else a file may hold
# the networks of a layer, ours → theirs
NETWORKS = {
    "phi_e": "edge_mlp",
    "phi_x": "coord_mlp_r",
    "phi_v": "coord_mlp_vel",
    "phi_h": "node_mlp",
    "phi_g": "gravity_mlp",
    "attention": "att_mlp.0",  # ours is the linear layer itself
    "virtual.phi_ev": "edge_mlp_virtual",
    "virtual.phi_xv": "coord_mlp_r_virtual",
    "virtual.phi_z": "coord_mlp_v_virtual",
    "virtual.phi_s": "node_mlp_virtual",
    "virtual.attention_v": "att_mlp_virtual.0",
}


def read(path: Path) -> dict[str, Any]:
    """The state dict in a .pt or .pth file, also where it stands under a name such as "state_dict" or "model".

    Raises Failure for a file that is missing, damaged, holds more than tensors, numbers and text, or no such state dict.
    """
    if not path.is_file():
        raise Failure(f"{path}: no such file")
    if Version(torch.__version__) < SAFE:
        raise Failure(f"{path}: torch {torch.__version__} cannot read a foreign file safely; install {SAFE} or newer")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of old pickles
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise Failure(
            f"{path}: damaged, or holds more than weights ({type(error).__name__}), which is not read, since that could run code; "
            "where you trust it, save its state dict alone"
        ) from error
    states = dict(_states(found))
    if not states:
        raise Failure(
            f"{path}: holds no FastEGNN state dict: no key '{MARKS[0]}'; is it a checkpoint of the authors' code?"
        )
    if len(states) > 1:
        raise Failure(f"{path}: holds {len(states)} state dicts, {' and '.join(states)}; save the one you mean alone")
    return next(iter(states.values()))


def _states(found: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each state dict in nested dicts, with the name it stands under."""
    if not isinstance(found, dict):
        return
    if any(str(key).removeprefix("module.") in MARKS for key in found):
        yield where, found
        return
    for key, value in found.items():
        yield from _states(value, f"{where}.{key}".removeprefix("."))


def plain(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same without the leading ``module.`` of a data-parallel wrapper. Raises Failure for what is no tensor."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = str(key).removeprefix("module.")
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise Failure(f"published weights: '{key}' is no tensor of real numbers but {kind}")
        if name in found:
            raise Failure(f"published weights: '{name}' is there twice, with and without 'module.'")
        found[name] = value
    return found


def sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of FastEGNN that the shapes and keys mean. Raises Failure for a key that is missing or misshapen."""

    def shape(key: str, axes: int) -> torch.Size:
        if key not in state:
            raise Failure(f"published weights: key '{key}' is missing")
        if state[key].ndim != axes:
            raise Failure(f"published weights: '{key}' has shape {tuple(state[key].shape)}, expected {axes} axes")
        return state[key].shape

    def rest(key: str, known: int, what: str) -> int:
        width = shape(key, 2)[1] - known
        if width < 0:
            raise Failure(
                f"published weights: '{key}' has {width + known} columns, at least {what} = {known} are expected"
            )
        return width

    hidden, features = shape("embedding_in.weight", 2)
    count = shape("virtual_node_feat", 3)[2]
    numbers = {int(found[1]) for key in state if (found := re.match(r"gcl_(\d+)\.", key))}
    for layer, number in enumerate(sorted(numbers)):
        if layer != number:
            raise Failure(f"published weights: keys of layer 'gcl_{layer}' are missing, though there is 'gcl_{number}'")
    return {
        "features": features,
        "node_attributes": rest("gcl_0.node_mlp.0.weight", 3 * hidden, "3H"),
        "edge_attributes": rest("gcl_0.edge_mlp.0.weight", 2 * hidden + 1, "2H + 1"),
        "hidden": hidden,
        "layers": len(numbers),
        "virtual_nodes": count,
        "attention": any(".att_mlp" in key for key in state),
    }


def check_gravity(state: Mapping[str, Tensor], gravity: Sequence[float] | None) -> None:
    """Raise Failure where the weights have a network for gravity and no vector (3,) is given, or the other way round."""
    there = any(".gravity_mlp." in key for key in state)
    if there and gravity is None:
        raise Failure(
            "published weights: there is a gravity_mlp, so they need the vector they were trained with: "
            "gravity=[0, -9.81, 0] or so (--gravity 0,-9.81,0)"
        )
    if gravity is not None and len(gravity) != 3:
        raise Failure(f"gravity={gravity}: must be a vector of 3 numbers")
    if gravity is not None and not there:
        raise Failure(f"gravity={gravity}: published weights without a gravity_mlp; leave it out (null)")


def renamed(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under our names; ours: a FastEGNN's own state dict, whose names and shapes say what is expected.

    Raises Failure for a key that is unknown, missing or misshapen, naming it.
    """
    names = {_theirs(name): name for name in ours}
    for key in state:
        if key not in names:
            raise Failure(
                f"published weights: unknown key '{key}'; not a FastEGNN of the authors' code, or another version"
            )
    result = {}
    for key, name in names.items():
        if key not in state:
            raise Failure(f"published weights: key '{key}' is missing")
        value, wanted = state[key], tuple(ours[name].shape)
        if name == "s":
            wanted = (1, *wanted[::-1])
        if value.shape != wanted:
            raise Failure(f"published weights: '{key}' has shape {tuple(value.shape)}, expected {wanted}")
        result[name] = value[0].t() if name == "s" else value
    return result


def _theirs(name: str) -> str:
    """Their key of one of our parameters: layers.0.virtual.phi_ev.2.bias → gcl_0.edge_mlp_virtual.2.bias."""
    if name == "s":
        return "virtual_node_feat"
    if name.startswith("embedding."):
        return name.replace("embedding", "embedding_in")
    _, number, rest = name.split(".", 2)
    network = next(n for n in NETWORKS if rest.startswith(f"{n}."))
    return f"gcl_{number}.{NETWORKS[network]}{rest.removeprefix(network)}"
