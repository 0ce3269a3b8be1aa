"""Read a sweep file: its runs are grids of settings times seeds. docs/outputs.md describes the file."""

from __future__ import annotations

import copy
import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import config as configs
from ..data import dataset, identity
from ..data.store import open_store
from ..data.store_inputs import check_settings
from ..data.trajectories import Trajectories
from ..errors import Failure
from ..evaluate.rollout import open_trajectories, select_trajectories
from ..evaluate.rollout_metrics import check_length
from ..models import network
from ..partition import assign
from ..train.trainer import resolve_device
from ..utils import part_weights

KEYS = configs.keys()
TYPES: dict[type, str] = {dict: "a mapping", list: "a list that is not empty", str: "text"}
FILE = {"config": str, "out": str, "set": dict, "grids": list, "seeds": list, "baseline": dict, "plot": dict}
FILE["rollout"] = dict
GRID = {"keys": dict, "set": dict, "partition": dict}
RESERVED = {"train.seed": "seeds", "run.dir": "out"}  # config key → the key of the file that sets it
SETTABLE = set(KEYS) - set(RESERVED)
Settings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training. setting: its name without the seed; given: keys that its grid sets; store: None for one part.

    rollout: steps, and start if given, of the rollouts by which it is judged besides; empty: none.
    """

    setting: str
    given: Settings
    config: configs.Config
    store: Path | None
    rollout: Mapping[str, int]

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    def cell(self, key: str) -> str:
        """The value of a key in the table; empty if the run's grid does not set the key."""
        return to_text(self.given[key]) if key in self.given else ""

    def result(self) -> dict[str, Any] | None:
        """The numbers of a finished run. None also if they lack the rollouts that the file asks for."""
        file = self.folder / "result.json"
        result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        return result if result and (not self.rollout or result.get("rollout") == self.rollout) else None


@dataclass(frozen=True)
class Sweep:
    """A sweep file. varying: config keys whose values differ between runs; x, lines: keys of axis and curves."""

    out: Path
    runs: list[Run]
    varying: list[str]
    baseline: dict[str, str]
    x: str
    lines: list[str]

    def missing(self) -> int:
        return sum(run.result() is None for run in self.runs)


def to_text(value: Any) -> str:
    """A value as it stands in names and tables."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def short(key: str) -> str:
    """A config key without its section, if no other section has a key of this name."""
    leaf = key.split(".")[-1]
    return leaf if sum(k.endswith(f".{leaf}") for k in KEYS) == 1 else key


def _check(given: Any, known: Collection[str], where: str, required: Collection[str] = ()) -> Settings:
    """Return the mapping. Raises Failure for unknown and missing keys, and for values of other types than ``known`` has."""
    if not isinstance(given, dict):
        raise Failure(f"{where}: must be a mapping of keys to values")
    for key, value in given.items():
        if key not in known:
            closest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {closest[0]}?" if closest else f"known: {', '.join(sorted(known))}"
            if key in configs.SECTIONS:
                hint = "this is a config; a sweep file names one under its key 'config'"
            elif key in RESERVED:
                hint = f"the sweep sets it; use the file's key '{RESERVED[key]}'"
            raise Failure(f"{where}: unknown key '{key}'; {hint}")
        kind = known[key] if isinstance(known, dict) else object
        if not isinstance(value, kind) or (kind is list and not value):
            raise Failure(f"{where}: {key} must be {TYPES[kind]}, not {value!r}")
    for key in sorted({*required} - {*given}):
        raise Failure(f"{where}: key '{key}' is missing")
    return given


def load(path: Path) -> Sweep:
    """Read a sweep file. Raises Failure for every error that can be found without the data."""
    if not path.is_file():
        raise Failure(f"{path}: no such sweep file; docs/outputs.md shows one")
    given = _check(configs.read_yaml(path.read_bytes(), str(path)), FILE, str(path), ("config", "out", "grids"))
    fixed = _check(given.get("set", {}), SETTABLE, f"{path}: set")
    seeds, out = given.get("seeds", ["0"]), Path(given["out"]).expanduser()
    if not all(type(s) is str and s.isdecimal() for s in seeds) or len(set(map(int, seeds))) < len(seeds):
        raise Failure(f"{path}: seeds=[{', '.join(map(str, seeds))}]: must be different whole numbers from 0")
    known, required = {"steps": str, "start": str}, ["steps"] * ("rollout" in given)
    rollout = _check(given.get("rollout", {}), known, f"{path}: rollout", required)
    if not all(v.isdecimal() for v in rollout.values()) or rollout.get("steps") == "0":
        raise Failure(f"{path}: rollout: steps must be a whole number from 1, start one from 0")
    rollout = {k: int(v) for k, v in rollout.items()}
    unique: dict[str, Run] = {}  # by config: two grids may share a run
    for number, grid in enumerate(given["grids"]):
        for run in _runs_of_grid(given["config"], out, fixed, grid, rollout, f"{path}: grids[{number}]"):
            unique.setdefault(configs.to_yaml(run.config), run).given.update(run.given)
    runs = list(unique.values())
    names = [run.setting for run in runs]
    for name in {n for n in names if names.count(n) > 1 or len(n) > 200}:
        raise Failure(f"{path}: {name[:60]}…: names of runs must differ and stay below 200 letters; use shorter values")
    keys = dict.fromkeys(k for run in runs for k in run.given)
    varying = [k for k in keys if len({run.cell(k) for run in runs}) > 1]
    baseline = _check(given.get("baseline", {}), varying, f"{path}: baseline, keys that vary")
    baseline = {k: to_text(configs.convert(k, v, f"{path}: baseline")) for k, v in baseline.items()}
    if not any(all(run.cell(k) == v for k, v in baseline.items()) for run in runs):
        raise Failure(f"{path}: baseline: no run has {', '.join(f'{k}={v}' for k, v in baseline.items())}")
    plot = _check(given.get("plot", {}), {"x": str, "lines": list}, f"{path}: plot", ["x"] * ("plot" in given))
    x, lines = plot.get("x", ""), plot.get("lines", [k for k in varying if k != plot.get("x")])
    _check(dict.fromkeys([x, *lines] if x else []), varying, f"{path}: plot, keys that vary")
    if x and len({tuple(run.cell(k) for k in (x, *lines)) for run in runs}) < len(runs):
        raise Failure(f"{path}: plot: runs differ in more than x and lines; name all of {', '.join(varying)}")
    return Sweep(out, [_with_seed(run, int(seed), out) for seed in seeds for run in runs], varying, baseline, x, lines)


def _runs_of_grid(
    base: str, out: Path, fixed: Settings, grid: Any, rollout: Mapping[str, int], where: str
) -> Iterator[Run]:
    """The settings of a grid, each once, without a seed. base: the config; fixed: keys that the whole sweep sets."""
    grid = _check(grid, GRID, where)
    keys = _check(grid.get("keys", {}), dict.fromkeys(SETTABLE, list), f"{where}.keys")
    own = _check(grid.get("set", {}), SETTABLE, f"{where}.set")
    parts = _check(grid.get("partition", {}), {"parts", "method", "seed"}, f"{where}.partition")
    partition = {f"partition.{k}": v for k, v in parts.items()}
    for values in itertools.product(*keys.values()):
        varied = dict(zip(keys, values, strict=True))
        chosen = {**varied, **own, **partition, **varied}  # first for the order of names and columns, last to win
        try:
            texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (fixed | chosen).items()}
            config = configs.load(os.path.expanduser(base), [f"{k}={v}" for k, v in texts.items()])
            network.model_class(config.model.name)
            needs_store = config.partition.parts > 1 and not dataset.is_store(config.data.path)
        except Failure as failure:
            raise Failure(f"{where}: {failure}") from failure
        used = {k: attrgetter(k)(config) for k in chosen}
        name = re.sub(r"[^\w.=,+-]+", "_", ",".join(f"{short(k)}={to_text(v)}" for k, v in used.items())) or "base"
        yield Run(name, used, config, out / "stores" / _store_name(config) if needs_store else None, rollout)


def _store_name(config: configs.Config) -> str:
    """The same for all runs whose data are partitioned alike; without weights, as in versions that had none."""
    partition = {k: v for k, v in asdict(config.partition).items() if (k, v) != ("weights", None)}
    digest = hashlib.sha256(json.dumps([asdict(config.data), partition]).encode()).hexdigest()[:10]
    return f"{config.partition.method}-{config.partition.parts}-{digest}"


def _with_seed(run: Run, seed: int, out: Path) -> Run:
    """The run with a seed and a folder. Raises Failure if the folder holds a run with other settings."""
    config, folder = copy.deepcopy(run.config), out / f"{run.setting},seed={seed}"
    config.train.seed, config.run.dir = seed, str(folder)
    if (file := folder / "wanted.yaml").is_file():
        for key, old, new in configs.differences(configs.load(file, published=True), config):
            raise Failure(f"{folder}: holds a run with {key}={old}, not {new}; remove it or change out")
    return replace(run, config=config)


def check_data(sweep: Sweep) -> None:
    """Raise Failure for data or a device that is missing, for a store that was made with other settings, and if finished
    runs were trained on what data.path held before."""
    for run in {run.setting: run for run in sweep.runs}.values():
        config, cut = run.config, run.config.partition
        assign.check_method(cut.method, 1, cut.weights and part_weights.validate(cut.weights, len(cut.weights)))
        resolve_device(config)
        dataset.part_count(config)
        if dataset.is_store(config.data.path):
            check_settings(open_store(config.data.path).inputs, config.data.path, config.data)
        if run.rollout:
            file = open_trajectories(run.folder, config, None)
            for k in select_trajectories(file, "test"):
                check_length(file, k, config.data, **run.rollout)
        elif not dataset.is_store(config.data.path):
            Trajectories(config.data.path)
    check_same_data(sweep, {path: identity.digest(identity.of_data(path)) for path in _paths(sweep)})


def _paths(sweep: Sweep) -> list[str]:
    """data.path of the runs, each once."""
    return list(dict.fromkeys(run.config.data.path for run in sweep.runs))


def check_same_data(sweep: Sweep, present: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raise Failure if finished runs of one data.path were trained on different data, of which means would be taken.

    present: path → digest of the data that it holds now. Results of older versions tell no digest and are not compared.
    """
    for path in _paths(sweep):
        by_digest: dict[str, list[Path]] = {present[path]: []} if present.get(path) else {}
        for run in sweep.runs:
            if run.config.data.path == path and (digest := (run.result() or {}).get("data")):
                by_digest.setdefault(digest, []).append(run.folder)
        if len(by_digest) > 1:
            old = [folder for digest, folders in by_digest.items() if digest != present.get(path) for folder in folders]
            where = f"{sweep.out}: {path} has changed between runs"
            raise Failure(f"{where}; remove those of the old data, or change out: rm -r {' '.join(map(str, old))}")
