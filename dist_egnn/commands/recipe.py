"""A recipe in one command, from its data to a table of errors: what every recipe's run.py calls."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from .. import config as configs
from ..config import Config
from ..data import dataset, prepare
from ..errors import Failure
from ..models import network
from ..train import checkpoint, run_dir
from ..utils.filesystem import lock_output, write_atomically
from .evaluate import print_rollouts, run_evaluation
from .partition import run_partition
from .train import run_training

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as cli.py does
MODELS = ("Linear", "EGNN", "FastEGNN")
OPTIONS = {"run.dir": "--out", "model.name": "--models", "partition.parts": "--parts"}  # keys that options set


def parse(
    recipe: Path,
    scales: Mapping[str, Sequence[str]],
    arguments: Sequence[str] | None,
    config: str = "config.yaml",
    models: Sequence[str] = MODELS,
) -> argparse.Namespace:
    """Parse the options of a run.py. Raises Failure for invalid values."""
    keys_set = "\n".join(f"  {scale:6} {' '.join(keys) or f'{config} as it is'}" for scale, keys in scales.items())
    parser = prepare.Parser(
        prog=f"{recipe.name}/run.py",
        description=f"{recipe.name}: prepare data, partition, train, evaluate.\nRepeat the command to continue.",
        epilog=f"config keys that a scale sets:\n{keys_set}\n\nprepare.py --help shows how long the data takes.\n\n"
        f"example:\n  python recipes/{recipe.name}/run.py --scale tiny --models EGNN FastEGNN train.lr=1e-3\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("overrides", nargs="*", metavar="KEY=VALUE", help="config keys to set; data.path names data of your own")
    option("--scale", choices=prepare.SCALES, default="tiny", help="amount of data (default tiny; full: as published)")
    option("--out", type=Path, help=f"folder of all results (default runs/{recipe.name}-SCALE)")
    option("--models", nargs="+", default=models, metavar="MODEL", help=f"default {' '.join(models)}")
    option("--parts", type=int, default=1, help="processes that share each graph, cut by METIS (default 1)")
    option("--epochs", type=int, help="number of epochs (default: of the scale, see below)")
    option("--debug", action="store_true", help="print a traceback after an error")
    options = parser.parse_intermixed_args(arguments)
    options.overrides += [word for word in options.models if "=" in word]  # overrides that follow --models
    options.models = list(dict.fromkeys(word for word in options.models if "=" not in word)) or models
    options.out = options.out or Path("runs") / f"{recipe.name}-{options.scale}"
    if options.parts < 1:
        raise Failure(f"--parts {options.parts}: must be at least 1")
    for word in options.overrides:
        if flag := OPTIONS.get(word.partition("=")[0]):
            raise Failure(f"override '{word}': use {flag} instead")
    return options


def run_recipe(
    recipe: Path,
    scales: Mapping[str, Sequence[str]],
    arguments: Sequence[str] | None = None,
    *,
    config: str = "config.yaml",
    models: Sequence[str] = MODELS,
    rollout: int = 0,
) -> None:
    """Prepare, partition, train and evaluate what is missing; print a table and write it to OUT/results.csv.

    recipe: its folder; scales: for tiny, small and full, the key=value words that change the recipe's config; models: the
    default; rollout: steps of the rollouts of the test split that are evaluated too, 0: none.
    """
    options = parse(recipe, scales, arguments, config, models)
    for name in options.models:
        network.model_class(name)
    data = options.out / f"{recipe.name}-{options.scale}.h5"
    words = [f"data.path={data}", f"partition.parts={options.parts}", *scales[options.scale]]
    words += [*([] if options.epochs is None else [f"train.epochs={options.epochs}"]), *options.overrides]
    base = configs.load(recipe / config, words)
    if Path(base.data.path) == data and not data.exists():
        done = subprocess.run([sys.executable, recipe / "prepare.py", "--scale", options.scale, "--out", data])
        if done.returncode < 0:
            raise Failure(f"{recipe / 'prepare.py'}: killed by signal {-done.returncode}; was memory short?")
        if done.returncode:
            raise SystemExit(done.returncode)  # prepare.py has printed the error
    base.data.path = str(Path(base.data.path).absolute())
    if options.parts > 1 and not dataset.is_store(base.data.path):
        run_partition(base, options.out / f"store-{options.parts}")
    errors: dict[str, float] = {}
    for name in options.models:
        folder = options.out / name
        one = configs.load(recipe / config, [*words, f"model.name={name}", f"run.dir={folder.as_posix()}"])
        one.data.path = base.data.path
        _train(one, folder)
        errors |= run_evaluation(folder)
        if rollout:
            print_rollouts(folder, rollout, "test", None)
    table = pd.DataFrame({"prediction": errors.keys(), "test MSE": errors.values()})
    table = table.assign(**{f"of {name}": table["test MSE"] / errors[name] for name in ("linear", "static")})
    with lock_output(options.out / "results.csv", wait_s=60):
        write_atomically(options.out / "results.csv", table.to_csv(index=False).encode())
    print(f"{options.out / 'results.csv'}: linear is x + t·v, t fitted on the training split; static is x")
    formats = {"test MSE": "{:.4e}".format, "of linear": "{:.3f}".format, "of static": "{:.3f}".format}
    print(table.to_string(index=False, formatters=formats))


def _train(config: Config, folder: Path) -> None:
    """Train or resume a run, unless it is finished. Raises Failure if the folder holds a run of another config."""
    if resumable := run_dir.can_resume(folder):
        for key, old, new in configs.differences(
            configs.load(folder / run_dir.CONFIG, published=True), config, ["run.dir"]
        ):
            remedy = "delete that folder or choose another --out"
            raise Failure(f"{folder / run_dir.CONFIG}: {key} is {old} there and {new} now; {remedy}")
        if checkpoint.last_state(folder).finished(config.train):
            print(f"{folder}: trained already")
            return
    run_training(config, resumable)
