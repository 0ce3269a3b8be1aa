"""A recipe from its source to a table, in one command: what every recipe's run.py calls."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import config as configs
from ..config import Config
from ..data import prepare
from ..errors import Failure
from ..train import resume, run_dir
from .evaluate import run_evaluation
from .partition import run_partition
from .train import run_training

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as cli.py does

MODELS = ("Linear", "EGNN", "FastEGNN")


def parse(recipe: Path, scales: Mapping[str, Sequence[str]], arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a run.py; Failure for what cannot be."""
    set_by = "\n".join(f"  {scale:6} {' '.join(keys) or 'config.yaml as it is'}" for scale, keys in scales.items())
    parser = prepare.Parser(
        prog=f"{recipe.name}/run.py",
        description=f"{recipe.name} in one command: prepare the data, partition, train, evaluate, and print one table.\n"
        "The same command goes on where it was interrupted.",
        epilog=f"config keys that a scale sets:\n{set_by}\n\nHow long the data takes: prepare.py --help\n\n"
        f"example:\n  python recipes/{recipe.name}/run.py --scale tiny --models EGNN FastEGNN train.lr=1e-3\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option(
        "overrides", nargs="*", metavar="KEY=VALUE", help="config keys to set; data.path: your data, none is prepared"
    )
    option("--scale", choices=prepare.SCALES, default="tiny", help="how much data (default tiny; full: as published)")
    option("--out", type=Path, help=f"folder of everything (default runs/{recipe.name}-SCALE)")
    option("--models", nargs="+", default=MODELS, metavar="MODEL", help=f"default {' '.join(MODELS)}")
    option("--parts", type=int, default=1, help="processes that share each graph, cut by METIS (default 1)")
    option("--epochs", type=int, help="default: as the scale sets it, see below")
    option("--debug", action="store_true", help="show a traceback when something fails")
    options = parser.parse_intermixed_args(arguments)
    options.overrides += [word for word in options.models if "=" in word]  # what follows --models
    options.models = list(dict.fromkeys(word for word in options.models if "=" not in word)) or MODELS
    options.out = options.out or Path("runs") / f"{recipe.name}-{options.scale}"
    if options.parts < 1:
        raise Failure(f"--parts {options.parts}: must be at least 1")
    given = {word.partition("=")[0] for word in options.overrides}
    for key, flag in (("run.dir", "--out"), ("model.name", "--models"), ("partition.parts", "--parts")):
        if key in given:
            raise Failure(f"override '{key}': use {flag} instead")
    return options


def data_of(recipe: Path, scale: str, path: Path) -> None:
    """Prepare the data of a scale if they are not there."""
    if path.exists():
        return
    done = subprocess.run([sys.executable, str(recipe / "prepare.py"), "--scale", scale, "--out", str(path)])
    if done.returncode < 0:
        raise Failure(f"{recipe / 'prepare.py'}: killed by signal {-done.returncode}; memory?")
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why


def finished(config: Config) -> bool:
    """Whether the run of a config is over. Failure where its folder holds a run of another config."""
    folder = Path(config.run.dir)
    if not run_dir.can_resume(folder):
        return False
    for key, was, now in configs.differences(configs.load(folder / "config.yaml"), config):
        raise Failure(
            f"{folder / 'config.yaml'}: {key} is {was} there and {now} now; delete that folder, or choose another --out"
        )
    return resume.finished(folder, config.train)


def run(recipe: Path, scales: Mapping[str, Sequence[str]], arguments: Sequence[str] | None = None) -> None:
    """Source → partition → train → evaluate → a table, printed and in OUT/results.csv; what is there is kept.

    recipe: its folder; scales: the config keys, as key=value, that tiny, small and full set beside its config.yaml.
    """
    import pandas as pd

    options = parse(recipe, scales, arguments)
    data = options.out / f"{recipe.name}-{options.scale}.h5"
    epochs = [f"train.epochs={options.epochs}"] if options.epochs is not None else []
    given = [f"data.path={data}", f"partition.parts={options.parts}", *scales[options.scale], *epochs]
    base = configs.load(recipe / "config.yaml", [*given, *options.overrides])
    from ..data import dataset
    from ..models import network

    for name in options.models:
        network.model_class(name)
    if Path(base.data.path) == data:
        data_of(recipe, options.scale, data)
    base.data.path = str(Path(base.data.path).absolute())
    if options.parts > 1 and not dataset.is_store(base.data.path):
        run_partition(base, options.out / f"store-{options.parts}")
    errors: dict[str, float] = {}
    for name in options.models:
        config = configs.load(
            recipe / "config.yaml",
            [*given, *options.overrides, f"model.name={name}", f"run.dir={(options.out / name).as_posix()}"],
        )
        config.data.path = base.data.path
        if finished(config):
            print(f"{config.run.dir}: trained already")
        else:
            run_training(config, resume=run_dir.can_resume(options.out / name))
        errors |= run_evaluation(options.out / name)
    table = pd.DataFrame({"prediction": errors.keys(), "test MSE": errors.values()})
    for reference in ("linear", "static"):
        table[f"of {reference}"] = table["test MSE"] / errors[reference]
    table.to_csv(options.out / "results.csv", index=False)
    print(f"{options.out / 'results.csv'}: linear is x + t v, t fitted on the training split; static is x")
    formats = {"test MSE": "{:.4e}".format, "of linear": "{:.3f}".format, "of static": "{:.3f}".format}
    print(table.to_string(index=False, formatters=formats))
