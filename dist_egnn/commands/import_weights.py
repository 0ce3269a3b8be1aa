"""`distegnn import-checkpoint`: make a run of FastEGNN weights that the authors' code wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Config
from ..distributed.comm import SingleProcess
from ..errors import Failure
from ..models import network, published_weights
from ..train import checkpoint, run_dir, trainer
from ..utils.console import print_table
from ..utils.filesystem import lock_folder


def check_new(folder: Path) -> None:
    """Raise Failure if the folder holds a run, finished or not."""
    if found := [name for name in (run_dir.CONFIG, run_dir.LAST, run_dir.METRICS) if (folder / name).exists()]:
        raise Failure(f"{folder}: holds a run already ({found[0]}); choose another --out")


def run_import(file: Path, config: Config) -> None:
    """Make a run of published FastEGNN weights, in run.dir. Raises Failure for weights that do not fit the config.

    config: the data section of the training, model.normalize and model.gravity; the weights define the rest.
    """
    folder, data, given = Path(config.run.dir), config.data, config.model
    check_new(folder)
    if given.tanh:
        raise Failure("model.tanh=true: published weights use tanh in other networks too; leave this key out")
    state = published_weights.read_state_dict(file)
    try:
        model = network.FastEGNN.from_published(state, normalize=given.normalize, gravity=given.gravity)
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
    config.model = replace(given, name="FastEGNN", attention=attention, **sizes)
    data.path = data.path and str(Path(data.path).absolute())  # the run is evaluated from anywhere
    data.velocity_scale = data.velocity_scale or 1.0  # the weights know of no scale
    content = checkpoint.weights_only(model, config)
    configured = trainer.build_model(config, (widths["f"], widths["a"]), SingleProcess())
    checkpoint.load_weights(configured, content, file)  # must accept the weights
    with lock_folder(folder, "another process is writing a run there; choose another --out"):
        check_new(folder)  # again, now that no other process can make a run there
        checkpoint.save(folder / run_dir.BEST, content)
        run_dir.write_config(config)
    shown = {**sizes, "features": widths["f"], "node_attributes": widths["a"], "attention": attention}
    print_table(f"{folder}: FastEGNN of {file}", ["option", "found"], [[k, v] for k, v in shown.items()])
