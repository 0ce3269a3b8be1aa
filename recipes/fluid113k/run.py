"""Fluid113K in one command: prepare data, partition, train, evaluate and print a table (see --help)."""

import functools
import sys
from pathlib import Path

from dist_egnn.commands import recipe
from dist_egnn.data import prepare

SCALES = {  # config overrides of each scale
    "tiny": ["train.epochs=10", "train.accumulate=1", "train.lr=2e-3"],
    "small": ["train.epochs=20", "train.accumulate=1", "train.lr=2e-3"],
    "full": [],
}

if __name__ == "__main__":
    sys.exit(prepare.main(functools.partial(recipe.run_recipe, Path(__file__).parent, SCALES)))
