"""`distegnn import-checkpoint`: make a run of FastEGNN weights that the authors' code wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from ..config import Config
from ..distributed.comm import SingleProcess
from ..errors import Failure
from ..models import network
from ..train import checkpoint, run_dir, trainer
from ..utils.console import print_table
from ..utils.filesystem import lock_folder

DERIVED = {  # data.features, data.node_attributes and input frames of the authors' datasets, which are not in their configs
    "nbody": ["data.features=[speed, charge/max]"],
    "protein": ["data.features=[speed, charge/max]"],
    "Water-3D": ["data.features=[speed, type/max]", "data.frames=15", "data.last_frame=250"],
    "Fluid113K": [
        "data.features=[viscosity, mass, speed]",
        "data.node_attributes=[viscosity, mass]",
        "data.frames=16",
        "data.last_frame=50",
    ],
}
SAME = {  # our key → theirs, with the same meaning
    "model.normalize": "model.normalize",
    "data.radius": "data.radius",
    "data.edge_drop": "data.cutoff_rate",
    "data.horizon": "data.delta_t",
    "loss.mmd": "train.mmd.weight",
    "loss.sigma": "train.mmd.sigma",
    "loss.samples": "train.mmd.samples",
    "train.batch_size": "data.batch_size",
    "train.accumulate": "train.accumulation_steps",
    "train.lr": "train.learning_rate",
    "train.weight_decay": "train.weight_decay",
    "train.epochs": "train.epochs",
    "train.patience": "train.early_stop",
    "train.seed": "seed",
}


def published_settings(config: Mapping[str, Any], file: Path) -> list[str]:
    """The settings in a config of the authors' code, as overrides. Raises Failure for a model other than FastEGNN."""
    flat = _flatten(config)
    if (name := flat.get("model.model_name", "FastEGNN")) != "FastEGNN":
        raise Failure(f"{file}: holds a {name}; only FastEGNN can be imported")
    if "data.inner_radius" in flat:
        flat["data.radius"] = flat["data.inner_radius"]
    if flat.get("data.radius") == -1:
        flat["data.radius"] = math.inf
    words = []
    first, last = flat.get("data.frame_0"), flat.get("data.frame_T")
    if isinstance(first, int) and isinstance(last, int):
        flat["data.delta_t"] = last - first
        words += [f"data.first_frame={first}", f"data.last_frame={first}"]
    words += [f"{ours}={flat[theirs]}" for ours, theirs in SAME.items() if theirs in flat]
    dataset = str(flat.get("data.dataset_name", ""))
    return words + [word for name in DERIVED if dataset.startswith(name) for word in DERIVED[name]]


def _flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The numbers and text in nested dicts, by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            flat[f"{prefix}{key}"] = value
    return flat


def check_new(folder: Path) -> None:
    """Raise Failure if the folder holds a run, finished or not."""
    if found := [name for name in (run_dir.CONFIG, run_dir.LAST, run_dir.METRICS) if (folder / name).exists()]:
        raise Failure(f"{folder}: holds a run already ({found[0]}); choose another folder")


def write_run(model: Module, config: Config, widths: tuple[int, int], source: Path, **more: Any) -> None:
    """Write best.pt and config.yaml of a model in run.dir. more: further keys of the checkpoint.

    Raises Failure, which names ``source``, for weights that do not fit the config, and if the folder holds a run.
    """
    folder, data = Path(config.run.dir), config.data
    data.path = data.path and str(Path(data.path).absolute())  # the run is evaluated from anywhere
    content = checkpoint.weights_only(model, config) | {"widths": list(widths), **more}
    configured = trainer.build_model(config, widths, SingleProcess())
    checkpoint.load_weights(configured, content, source, "set the config's model section to that of the weights")
    with lock_folder(folder, "another process is writing a run there; choose another folder"):
        check_new(folder)
        checkpoint.save(folder / run_dir.BEST, content)
        run_dir.write_config(config)


def run_import(file: Path, state: Mapping[str, torch.Tensor], config: Config) -> None:
    """Make a run of published FastEGNN weights, in run.dir. Raises Failure for weights that do not fit the config.

    state: the state dict in the file; config: of the training, in which the weights define the sizes of the model.
    """
    folder, data, given = Path(config.run.dir), config.data, config.model
    check_new(folder)
    options: dict[str, Any] = {"normalize": given.normalize, "tanh": given.tanh, "gravity": given.gravity}
    try:
        model = network.FastEGNN.from_published(state, **options)
    except Failure as failure:
        raise Failure(f"{file}: {failure}") from failure
    widths = model.widths
    if widths["e"] != 2:  # of every sample: the length of the edge, twice
        raise Failure(f"{file}: the weights take {widths['e']} edge attributes, samples have 2: the length, twice")
    for key, width in (("features", widths["f"]), ("node_attributes", widths["a"])):
        names = getattr(data, key)
        if names is not None and len(names) != width:
            raise Failure(f"data.{key}=[{', '.join(names)}]: the weights of {file} take {width}; name as many")
    sizes: dict[str, Any] = {"hidden": model.hidden, "layers": len(model.layers), "virtual_nodes": model.count}
    attention = any("attention" in name for name in model.state_dict())
    messages = model.virtual_messages
    config.model = replace(given, name="FastEGNN", attention=attention, virtual_messages=messages, **sizes)
    data.velocity_scale = data.velocity_scale or 1.0  # the weights know of no scale
    write_run(model, config, (widths["f"], widths["a"]), file)
    shown = {**sizes, "virtual_messages": messages, "features": widths["f"], "node_attributes": widths["a"]}
    shown |= {"attention": attention, **options}
    print_table(f"{folder}: FastEGNN of {file}", ["option", "found"], [[k, v] for k, v in shown.items()])
