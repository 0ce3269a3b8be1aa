"""The configs of the recipes against the settings of the authors' runs (config/*.yaml of their repository DistEGNN).

A setting that differs must be in the table of differences of the recipe's README, and nothing else may be.
"""

from __future__ import annotations

import math
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from dist_egnn import config

RECIPES = Path(__file__).parents[2] / "recipes"
COMMON: dict[str, Any] = {
    "data.edges": "radius",
    "data.edge_drop": 0.0,
    "data.velocity": "forward",
    "data.velocity_scale": 1.0,
    "data.node_attributes": [],
    "model.name": "FastEGNN",
    "model.as_published": True,
    "model.virtual_messages": "mean",
    "model.hidden": 64,
    "model.layers": 4,
    "model.virtual_nodes": 3,
    "model.normalize": False,
    "model.attention": False,
    "model.tanh": False,
    "model.gravity": None,
    "loss.kernel": "laplacian",
    "loss.samples": 3,
    "train.accumulate": 1,
    "train.lr": 5e-4,
    "train.schedule": "constant",
    "train.weight_decay": 1e-12,
    "train.clip": 0.0,
    "train.valid_interval": 2,
    "train.select": "one_step",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "nbody": {
        "data.radius": math.inf,
        "data.first_frame": 30,
        "data.last_frame": 30,
        "data.frames": 0,
        "data.horizon": 10,
        "data.features": ["speed", "charge/max"],
        "model.normalize": True,
        "loss.mmd": 0.03,
        "loss.sigma": 1.5,
        "train.batch_size": 250,
        "train.epochs": 2500,
        "train.patience": 2500,
    },
    "protein": {
        "data.radius": 10.0,
        "data.first_frame": 0,
        "data.last_frame": -1,
        "data.frames": 0,
        "data.horizon": 15,
        "data.features": ["speed", "charge/max"],
        "loss.mmd": 0.5,
        "loss.sigma": 1.0,
        "train.batch_size": 5,
        "train.lr": 2e-4,
        "train.weight_decay": 1e-8,
        "train.epochs": 2000,
        "train.patience": 100,
    },
    "water3d": {
        "data.radius": 0.035,
        "data.first_frame": 0,
        "data.last_frame": 250,
        "data.frames": 15,
        "data.horizon": 20,
        "data.features": ["speed", "type/max"],
        "loss.mmd": 0.01,
        "loss.sigma": 1.5,
        "train.batch_size": 15,
        "train.epochs": 2000,
        "train.patience": 50,
    },
    "fluid113k": {
        "data.radius": 0.075,
        "data.first_frame": 0,
        "data.last_frame": 50,
        "data.frames": 16,
        "data.horizon": 20,
        "data.features": ["viscosity", "mass", "speed"],
        "data.node_attributes": ["viscosity", "mass"],
        "partition.method": "metis",
        "model.as_published": False,  # only FastEGNN has a config
        "loss.mmd": 0.01,
        "loss.sigma": 3.0,
        "loss.samples": 50,
        "train.batch_size": 1,
        "train.accumulate": 4,
        "train.clip": 0.3,
        "train.epochs": 2500,
        "train.patience": 100,
    },
}


def documented(readme: str) -> set[str]:
    """The keys in the first column of the table of differences."""
    section = readme.partition("## Differences from the authors' runs")[2].partition("\n## ")[0]
    return {key for row in re.findall(r"^\| (.*?) \|", section, re.M) for key in re.findall(r"`(\w+\.\w+)`", row)}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_settings_are_published_or_named_as_different(recipe: str) -> None:
    settings, theirs = config.load(RECIPES / recipe / "config.yaml"), {**COMMON, **PUBLISHED[recipe]}
    different = {key for key, value in theirs.items() if attrgetter(key)(settings) != value}
    assert documented((RECIPES / recipe / "README.md").read_text()) == different


def test_every_setting_of_the_recipes_is_compared() -> None:
    elsewhere = {"data.path", "run.dir", "partition.parts"}
    for recipe, own in PUBLISHED.items():
        given = config.read_yaml((RECIPES / recipe / "config.yaml").read_text(), recipe)
        keys = {f"{section}.{name}" for section, entries in given.items() for name in entries}
        assert keys - elsewhere <= {*COMMON, *own}, recipe


def test_a_difference_without_a_row_is_found() -> None:
    table = "## Differences from the authors' runs\n\n| `data.horizon` | 20 | 15 |\n\n## Other\n\n| `train.lr` | |\n"
    assert documented(table) == {"data.horizon"}
