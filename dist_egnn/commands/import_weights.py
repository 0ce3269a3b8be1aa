"""`distegnn import-checkpoint`: make a run of FastEGNN weights that the authors' code wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Config
from ..distributed.comm import SingleProcess
from ..errors import Failure
from ..models import network, published_weights
from ..train import checkpoint, trainer
from ..utils.console import print_table

EDGE_ATTRIBUTES = 2  # of every sample: the length of the edge, twice


def run_import(file: Path, config: Config) -> None:
    """Make a run of published FastEGNN weights: its config.yaml and best.pt, which `dist_egnn.load` reads.

    config: the data section of the training, model.normalize and model.gravity; the weights say the rest of the model.
    Raises Failure for a file that holds no such weights, and for weights that do not fit the config.
    """
    folder, data = Path(config.run.dir), config.data
    if (folder / "config.yaml").exists():
        raise Failure(f"{folder}: holds a run already; choose another --out")
    if config.model.tanh:
        raise Failure("model.tanh=true: published weights use tanh in other networks too; leave this key out")
    state = published_weights.read_state_dict(file)
    try:
        model = network.FastEGNN.from_published(state, normalize=config.model.normalize, gravity=config.model.gravity)
    except Failure as failure:
        raise Failure(f"{file}: {failure}") from failure
    widths = model.widths
    if widths["e"] != EDGE_ATTRIBUTES:
        raise Failure(
            f"{file}: the weights take {widths['e']} edge attributes, samples have {EDGE_ATTRIBUTES}: "
            "the length of the edge, twice"
        )
    for key, names, width in (("features", data.features, "f"), ("node_attributes", data.node_attributes, "a")):
        if names is not None and len(names) != widths[width]:
            raise Failure(
                f"data.{key}=[{', '.join(names)}]: {len(names)}, but the weights of {file} take {widths[width]}; "
                "name as many, in the order of training"
            )
    sizes: dict[str, Any] = {"hidden": model.hidden, "layers": len(model.layers), "virtual_nodes": model.count}
    attention = any("attention" in name for name in model.state_dict())
    config.model = replace(config.model, name="FastEGNN", attention=attention, **sizes)
    if data.path:
        data.path = str(Path(data.path).absolute())  # the run is evaluated from anywhere
    content = checkpoint.weights_only(model, config)
    # the model that the config describes must accept the weights
    checkpoint.load_weights(trainer.build_model(config, (widths["f"], widths["a"]), SingleProcess()), content, file)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / "best.pt", content)
    (folder / "config.yaml").write_text(content["config"])
    shown = {**sizes, "features": widths["f"], "node_attributes": widths["a"], "attention": attention}
    print_table(f"{folder}: FastEGNN of {file}", ["option", "found"], [[k, v] for k, v in shown.items()])
