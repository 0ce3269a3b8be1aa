"""`train.init`: a training starts from the weights of another run; those of equal name and shape are taken."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .. import config as configs
from ..config import Config
from ..data.identity import resolve_features
from ..errors import Failure
from ..utils.console import print_line, print_table
from . import checkpoint, run_dir
from .weight_average import WeightAverage

if TYPE_CHECKING:
    from .trainer import Trainer

TAKEN, DRAWN = "taken", "not there: drawn from train.seed"
SIZES = ("hidden", "channels", "basis", "virtual_nodes")  # of the model section: weights of another size are refused
# keys of the data and model sections on which the meaning of weights does not depend
NEUTRAL = {f"data.{name}" for name in ("path", "frames", "first_frame", "last_frame", "frame_seed", "pushforward")}
NEUTRAL |= {f"model.{name}" for name in ("name", "layers", "precision", "engine", "tile", *SIZES)}


def check(config: Config) -> None:
    """Raise Failure if train.init names no checkpoint that can be read."""
    if config.train.init:
        _read(config)


def _read(config: Config) -> bytes:
    try:
        return checkpoint.read(run_dir.weights_file(config.train.init))
    except Failure as failure:
        raise Failure(f"train.init={config.train.init}: {failure}") from failure


def load(trainer: Trainer) -> dict[str, str]:
    """Load the weights of train.init into the model of each rank, and print on rank 0 what was taken and what was not.

    Returns what checkpoints record: `path`, and `weights`, the file's sha256. A collective call. Raises Failure for
    weights of another width, and if none fits.
    """
    config, world = trainer.config, trainer.comm.world
    file = run_dir.weights_file(config.train.init)
    content, _ = checkpoint.read_on_rank_0(world, lambda: (_read(config), ""))
    source = checkpoint.parse(content, file)
    before = configs.parse(source["config"], f"{file}: its config")
    outcome = _take(trainer.model, source["model"], f"train.init={config.train.init}", before, config)
    trainer.average = WeightAverage(trainer.model, config.train.ema)
    if world.rank == 0:
        _report(str(file), outcome)
        before.data.features = resolve_features(before.data, source.get("data"))
        now = replace(config, data=replace(config.data, features=list(trainer.samples.names[0])))
        others = [d for d in configs.differences(before, now, NEUTRAL) if d[0].startswith(("data.", "model."))]
        if others:
            print_line("  other settings there: " + ", ".join(f"{k}={was} (here {now})" for k, was, now in others))
    return {"path": config.train.init, "weights": hashlib.sha256(content).hexdigest()}


def _take(
    model: torch.nn.Module, stored: dict[str, torch.Tensor], where: str, before: Config, now: Config
) -> dict[str, tuple[int, str]]:
    """Copy the weights that fit into the model; returns the numbers of each weight by name, and what became of them."""
    own, outcome = dict(model.named_parameters()), dict[str, tuple[int, str]]()
    for name, parameter in own.items():
        if name not in stored:
            outcome[name] = parameter.numel(), DRAWN
        elif stored[name].shape == parameter.shape:
            outcome[name] = parameter.numel(), TAKEN
        else:
            shapes = f"{tuple(stored[name].shape)} there, {tuple(parameter.shape)} here"
            outcome[name] = parameter.numel(), f"{name}: {shapes}; drawn from train.seed"
            _check_sizes(name, where, before, now)
    taken = [name for name, (_, why) in outcome.items() if why == TAKEN]
    if not taken:
        raise Failure(f"{where}: no weight fits model.name={now.model.name}; it has those of {before.model.name}")
    with torch.no_grad():
        for name in taken:
            own[name].copy_(stored[name])
    buffers = {name for name, _ in model.named_buffers()}
    left = {name: (t.numel(), "not in this model") for name, t in stored.items() if name not in {*own, *buffers}}
    return outcome | left


def _check_sizes(name: str, where: str, before: Config, now: Config) -> None:
    for size in SIZES:
        theirs, ours = getattr(before.model, size), getattr(now.model, size)
        if theirs != ours and (size != "virtual_nodes" or re.search(r"(^|\.)(s$|virtual\.)", name)):
            raise Failure(f"{where}: weights of model.{size}={theirs}, not {ours}; set model.{size}={theirs}")


def _report(file: str, outcome: dict[str, tuple[int, str]]) -> None:
    groups: dict[tuple[str, str], int] = defaultdict(int)
    for name, (count, why) in outcome.items():
        layer: Any = re.match(r"(backbone\.)?(layers\.\d+|[^.]+)", name)
        groups[layer[0], why] += count
    rows = [[layer, f"{count:,}", why] for (layer, why), count in groups.items()]
    print_table(f"{file}: initial weights", ["layer", "numbers", "of train.init"], rows)
