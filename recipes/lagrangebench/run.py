"""LagrangeBench in one command: prepare data, partition, train, evaluate and print tables (see --help)."""

import functools
import sys
from pathlib import Path
from typing import Any

from dist_egnn.commands import recipe
from dist_egnn.data import prepare

SCALES = {  # config overrides of each scale
    "tiny": ["data.radius=0.072", "train.epochs=5"],
    "small": [],
    "full": ["train.epochs=60"],
}
SETTINGS: dict[str, Any] = {"config": "simulator.yaml", "models": ("EGNN",), "rollout": 20}

if __name__ == "__main__":
    sys.exit(prepare.main(functools.partial(recipe.run_recipe, Path(__file__).parent, SCALES, **SETTINGS)))
