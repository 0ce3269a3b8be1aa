"""Water-3D in one command: data, partition, training, evaluation and a table; --help says how."""

import functools
import sys
from pathlib import Path

from dist_egnn.commands import recipe
from dist_egnn.data import prepare

SCALES = {  # config keys beside config.yaml
    "tiny": ["train.epochs=10", "train.batch_size=5"],
    "small": ["train.epochs=10"],
    "full": [],
}

if __name__ == "__main__":
    sys.exit(prepare.main(functools.partial(recipe.run_recipe, Path(__file__).parent, SCALES)))
