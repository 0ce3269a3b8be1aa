"""Water-3D in one command: prepare data, partition, train, evaluate and print a table (see --help)."""

import functools
import sys
from pathlib import Path

from dist_egnn.commands import recipe
from dist_egnn.data import prepare

SCALES = {  # config overrides of each scale
    "tiny": ["train.epochs=10", "train.batch_size=5"],
    "small": ["train.epochs=10"],
    "full": [],
}

if __name__ == "__main__":
    sys.exit(prepare.main(functools.partial(recipe.run_recipe, Path(__file__).parent, SCALES)))
