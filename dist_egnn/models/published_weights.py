"""FastEGNN weights of the authors' code: read without running code from the file, and renamed to the names used here.

Legend: H width, L layers, C virtual nodes, F input features, K node attributes, A edge attributes.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from ..errors import Failure

# before, torch.load(weights_only=True) could run code (CVE-2025-32434) or corrupt memory (CVE-2026-24747)
SAFE_TORCH = Version("2.10")
STATE_DICT_KEYS = ("virtual_node_feat", "embedding_in.weight")  # a dict with one of them is a state dict
# the networks of a layer, our name → theirs
NETWORKS = {
    "phi_e": "edge_mlp",
    "phi_x": "coord_mlp_r",
    "phi_v": "coord_mlp_vel",
    "phi_h": "node_mlp",
    "phi_g": "gravity_mlp",
    "attention": "att_mlp.0",  # theirs includes the sigmoid
    "virtual.phi_ev": "edge_mlp_virtual",
    "virtual.phi_xv": "coord_mlp_r_virtual",
    "virtual.phi_z": "coord_mlp_v_virtual",
    "virtual.phi_s": "node_mlp_virtual",
    "virtual.attention_v": "att_mlp_virtual.0",
}


def _failure(message: str) -> Failure:
    return Failure(f"published weights: {message}")


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict in a .pt or .pth file, at the top or nested under a name such as "model_state_dict", and the config.

    The config is that of the training, {} in a file without one. The authors store it as an EasyDict, which is read as a
    dict. Raises Failure if the file is missing or damaged, holds other objects, or not exactly one state dict.
    """
    if not path.is_file():
        raise Failure(f"{path}: no such file")
    if Version(torch.__version__) < SAFE_TORCH:
        version = f"torch {torch.__version__}"
        raise Failure(f"{path}: {version} cannot read files of others safely; install torch {SAFE_TORCH} or newer")
    try:
        allowed: list[Any] = [(OrderedDict, "easydict.EasyDict")]  # unpickled as the former; easydict is not imported
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")  # about old pickles
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types
        raise Failure(
            f"{path}: damaged, or holds more than weights and could run code ({type(error).__name__}); "
            "if you trust it, save its state dict alone"
        ) from error
    states = dict(_state_dicts(content))
    if not states:
        key = STATE_DICT_KEYS[0]
        raise Failure(f"{path}: holds no FastEGNN state dict: no key '{key}'; give a checkpoint of the authors' code")
    if len(states) > 1:
        raise Failure(f"{path}: holds {len(states)} state dicts, {' and '.join(states)}; save the intended one alone")
    config = content.get("config")
    return next(iter(states.values())), config if isinstance(config, dict) else {}


def _state_dicts(content: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each state dict in nested dicts, with its dotted name."""
    if not isinstance(content, dict):
        return
    if any(str(key).removeprefix("module.") in STATE_DICT_KEYS for key in content):
        yield name, content
        return
    for key, value in content.items():
        yield from _state_dicts(value, f"{name}.{key}".removeprefix("."))


def normalize_keys(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Remove the prefix ``module.`` of a data-parallel wrapper. Raises Failure for values that are no real tensors."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        name = str(key).removeprefix("module.")
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise _failure(f"'{key}' must be a tensor of real numbers, not {kind}")
        if name in result:
            raise _failure(f"'{name}' appears twice, with and without 'module.'")
        result[name] = value
    return result


def model_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of FastEGNN that shapes and keys imply. Raises Failure for a missing or misshapen key."""

    def shape(key: str, axes: int) -> torch.Size:
        if key not in state:
            raise _failure(f"key '{key}' is missing")
        if state[key].ndim != axes:
            raise _failure(f"'{key}' has shape {tuple(state[key].shape)}, expected {axes} axes")
        return state[key].shape

    def extra_columns(key: str, known: int, formula: str) -> int:
        columns = shape(key, 2)[1]
        if columns < known:
            raise _failure(f"'{key}' has {columns} columns, expected at least {formula} = {known}")
        return columns - known

    hidden, features = shape("embedding_in.weight", 2)
    count = shape("virtual_node_feat", 3)[2]
    layers = sorted({int(match[1]) for key in state if (match := re.match(r"gcl_(\d+)\.", key))})
    for expected, layer in enumerate(layers):
        if layer != expected:
            raise _failure(f"keys of layer 'gcl_{expected}' are missing, but 'gcl_{layer}' is there")
    node_attributes = extra_columns("gcl_0.node_mlp.0.weight", 3 * hidden, "3H")
    more = (count - 1) * hidden  # columns of φ_h in the authors' first code, which concatenates the m_ic
    concatenated = 0 < more <= node_attributes
    return {
        "features": features,
        "node_attributes": node_attributes - more if concatenated else node_attributes,
        "edge_attributes": extra_columns("gcl_0.edge_mlp.0.weight", 2 * hidden + 1, "2H + 1"),
        "hidden": hidden,
        "layers": len(layers),
        "virtual_nodes": count,
        "virtual_messages": "concat" if concatenated else "mean",
        "attention": any(".att_mlp" in key for key in state),
    }


def check_gravity(state: Mapping[str, Tensor], gravity: Sequence[float] | None) -> None:
    """Raise Failure unless a vector (3,) is given exactly if the weights have a network for gravity."""
    has_network = any(".gravity_mlp." in key for key in state)
    if has_network and gravity is None:
        raise _failure(
            "they have a gravity_mlp; set the vector of their training: model.gravity=[0,-1,0] in the authors' code"
        )
    if gravity is not None and len(gravity) != 3:
        raise Failure(f"gravity={gravity}: must be a vector of 3 numbers")
    if gravity is not None and not has_network:
        raise Failure(f"gravity={gravity}: the published weights have no gravity_mlp; leave it out")


def rename_keys(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], concatenated: int = 0) -> dict[str, Tensor]:
    """The weights under our names. ours: the state dict of a FastEGNN, with the expected names and shapes.

    concatenated: C, if φ_h reads all m_ic: the authors flatten them as (H, C), we as (C, H).
    Raises Failure for a key that is unknown, missing or has another shape.
    """
    names = {_their_name(name): name for name in ours}
    if unknown := [key for key in state if key not in names]:
        raise _failure(f"unknown key '{unknown[0]}'; not a FastEGNN of the authors' code, or another version of it")
    result = {}
    for key, name in names.items():
        if key not in state:
            raise _failure(f"key '{key}' is missing")
        value, shape = state[key], tuple(ours[name].shape)
        if name == "s":
            shape = (1, *shape[::-1])
        if value.shape != shape:
            raise _failure(f"'{key}' has shape {tuple(value.shape)}, expected {shape}")
        result[name] = value[0].t() if name == "s" else value
        if concatenated and name.endswith(".phi_h.0.weight"):
            hidden = len(value)
            parts = value.split([2 * hidden, concatenated * hidden, value.shape[1] - (2 + concatenated) * hidden], 1)
            m = parts[1].view(hidden, hidden, concatenated).transpose(1, 2).flatten(1)
            result[name] = torch.cat([parts[0], m, parts[2]], 1)
    return result


def _their_name(name: str) -> str:
    """layers.0.virtual.phi_ev.2.bias → gcl_0.edge_mlp_virtual.2.bias."""
    if name == "s":
        return "virtual_node_feat"
    if name.startswith("embedding."):
        return name.replace("embedding", "embedding_in")
    _, number, rest = name.split(".", 2)
    network = next(n for n in NETWORKS if rest.startswith(f"{n}."))
    return f"gcl_{number}.{NETWORKS[network]}{rest.removeprefix(network)}"
