"""A sweep file → its runs: the grids of settings times the seeds, all checked. docs/formats.md describes the file."""

from __future__ import annotations

import copy
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from .. import config as configs
from ..data import dataset
from ..data.store import Store
from ..data.store_inputs import check_settings
from ..data.trajectories import Trajectories
from ..errors import Failure
from ..models import network
from ..partition import assign
from ..train.trainer import resolve_device
from ..utils import part_weights

KEYS = configs.keys()
KINDS: dict[type, str] = {dict: "a mapping", list: "a list that is not empty", str: "text"}
FILE = {"config": str, "out": str, "set": dict, "grids": list, "seeds": list, "baseline": dict, "plot": dict}
GRID = {"keys": dict, "set": dict, "partition": dict}
OWN = {"train.seed": "seeds", "run.dir": "out"}  # config key → the key of the file that decides it
Settings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training. setting: its name without the seed; given: what its grid sets; store: where its parts go, if any."""

    setting: str
    given: Settings
    config: configs.Config
    store: Path | None

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    def cell(self, key: str) -> str:
        """A key's value in the table; empty where the run's grid does not name the key."""
        return text(self.given[key]) if key in self.given else ""

    def result(self) -> dict[str, float] | None:
        """What the finished run found."""
        file = self.folder / "result.json"
        return json.loads(file.read_text()) if file.is_file() else None


@dataclass
class Sweep:
    """A sweep file. varying: the config keys whose values differ between runs; baseline, x, lines: cells and keys to show."""

    out: Path
    runs: list[Run]
    varying: list[str]
    baseline: dict[str, str]
    x: str
    lines: list[str]

    def missing(self) -> int:
        return sum(run.result() is None for run in self.runs)


def text(value: Any) -> str:
    """A value as names and tables show it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def short(key: str) -> str:
    """A config key without its section where no other section has such a key."""
    leaf = key.split(".")[-1]
    return leaf if sum(k.endswith(f".{leaf}") for k in KEYS) == 1 else key


def _known(given: Any, known: Collection[str], where: str) -> Any:
    """The mapping, or Failure naming the first key that is not among the known ones and the nearest that is."""
    if not isinstance(given, dict):
        raise Failure(f"{where}: must be a mapping of keys to values")
    for key in given:
        if key in OWN and key not in known:
            raise Failure(f"{where}: {key} is the sweep's own; use the file's key '{OWN[key]}'")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            if key in configs.SECTIONS:
                hint = "this is a config, which a sweep names under its key 'config'"
            raise Failure(f"{where}: unknown key '{key}'; {hint}")
    return given


def _typed(given: Any, kinds: Mapping[str, type], where: str, needed: Collection[str] = ()) -> Settings:
    for key, value in _known(given, kinds, where).items():
        if not isinstance(value, kinds[key]) or value == []:
            raise Failure(f"{where}: {key} must be {KINDS[kinds[key]]}, not {value!r}")
    for key in needed:
        if key not in given:
            raise Failure(f"{where}: key '{key}' is missing")
    return given


def load(path: Path) -> Sweep:
    """Read a sweep file. Raises Failure for anything that could be told before the first run."""
    if not path.is_file():
        raise Failure(f"{path}: no such sweep file; docs/formats.md shows one")
    try:
        given = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # whatever the YAML reader raises
        raise Failure(f"{path}: not readable as YAML ({str(error).splitlines()[0]})") from error
    given = _typed(given, FILE, str(path), ("config", "out", "grids"))
    seeds = given.get("seeds", [0])
    if not all(type(s) is int and s >= 0 for s in seeds) or len(set(seeds)) < len(seeds):
        raise Failure(f"{path}: seeds={seeds}: must be different whole numbers from 0")
    found: dict[str, Run] = {}  # by all that decides it, so that two grids may share a run
    for number, grid in enumerate(given["grids"]):
        for run in _runs(path, given, grid, f"{path}: grids[{number}]"):
            found.setdefault(configs.to_yaml(run.config), run).given.update(run.given)
    settings, out = list(found.values()), Path(given["out"])
    names = [run.setting for run in settings]
    for name in {n for n in names if names.count(n) > 1 or len(n) > 200}:
        raise Failure(f"{path}: {name[:60]}…: names of runs must differ and stay below 200 letters; use shorter values")
    named = dict.fromkeys(k for run in settings for k in run.given)
    varying = [k for k in named if len({run.cell(k) for run in settings}) > 1]
    baseline = {
        k: text(v) for k, v in _known(given.get("baseline", {}), varying, f"{path}: baseline, keys that vary").items()
    }
    if not any(all(run.cell(k) == v for k, v in baseline.items()) for run in settings):
        raise Failure(f"{path}: baseline: no run has {', '.join(f'{k}={v}' for k, v in baseline.items())}")
    plot = _typed(given.get("plot", {}), {"x": str, "lines": list}, f"{path}: plot", ("x",) if "plot" in given else ())
    x, lines = plot.get("x", ""), plot.get("lines", [k for k in varying if k != plot.get("x")])
    _known(dict.fromkeys([x, *lines] if x else []), varying, f"{path}: plot, keys that vary")
    if x and len({tuple(run.cell(k) for k in (x, *lines)) for run in settings}) < len(settings):
        raise Failure(f"{path}: plot: runs differ in more than x and lines; name all of {', '.join(varying)}")
    sweep = Sweep(out, [_seeded(r, s, out) for s in seeds for r in settings], varying, baseline, x, lines)
    for run in sweep.runs:
        _same(run)
    return sweep


def _runs(path: Path, given: Settings, grid: Any, where: str) -> Iterator[Run]:
    """The settings of a grid, each once, without a seed yet."""
    grid = _typed(grid, GRID, where)
    settable = set(KEYS) - set(OWN)
    keys, own = _known(grid.get("keys", {}), settable, f"{where}.keys"), grid.get("set", {})
    fixed = _known(given.get("set", {}), settable, f"{path}: set") | _known(own, settable, f"{where}.set")
    parts = _known(grid.get("partition", {}), {"parts", "method", "seed"}, f"{where}.partition")
    partition = {f"partition.{k}": v for k, v in parts.items()}
    for key, values in keys.items():
        if not isinstance(values, list) or not values:
            raise Failure(f"{where}.keys: {key} must be {KINDS[list]}, not {values!r}")
    for values in itertools.product(*keys.values()):
        picked = dict(zip(keys, values, strict=True))
        chosen = {**picked, **own, **partition, **picked}  # in the order of names and columns; what is picked wins
        try:
            config = configs.load(given["config"], [f"{k}={json.dumps(v)}" for k, v in (fixed | chosen).items()])
            network.model_class(config.model.name)
            plain = config.partition.parts > 1 and not dataset.is_store(config.data.path)
        except Failure as failure:
            raise Failure(f"{where}: {failure}") from failure
        as_set = {k: configs.value_of(config, k) for k in chosen}
        name = re.sub(r"[^\w.=,+-]+", "_", ",".join(f"{short(k)}={text(v)}" for k, v in as_set.items())) or "base"
        store = None
        if plain:
            how = {k: v for k, v in asdict(config.partition).items() if (k, v) != ("weights", None)}
            cut = json.dumps(
                [asdict(config.data), how]
            )  # without weights a store's name is what it was before they came
            digest = hashlib.sha256(cut.encode()).hexdigest()[:10]
            store = Path(given["out"]) / "stores" / f"{config.partition.method}-{config.partition.parts}-{digest}"
        yield Run(name, as_set, config, store)


def _seeded(run: Run, seed: int, out: Path) -> Run:
    config = copy.deepcopy(run.config)
    config.train.seed, config.run.dir = seed, str(out / f"{run.setting},seed={seed}")
    return Run(run.setting, run.given, config, run.store)


def _same(run: Run) -> None:
    """Raise Failure if the run's folder holds a run of other settings."""
    marked = run.folder / "wanted.yaml"
    if not marked.is_file() or marked.read_text() == configs.to_yaml(run.config):
        return
    for key, was, now in configs.differences(configs.load(marked), run.config):
        raise Failure(f"{run.folder}: holds a run with {key}={was}, now it would be {now}; remove it or change out")


def check(sweep: Sweep) -> None:
    """Raise Failure for data or a device that is not there, and for a store made with other settings: before anything runs."""
    for config in {run.setting: run.config for run in sweep.runs}.values():
        cut = config.partition
        assign.check_method(cut.method, 1, cut.weights and part_weights.validate(cut.weights, len(cut.weights)))
        resolve_device(config)
        dataset.part_count(config)
        if dataset.is_store(config.data.path):
            check_settings(Store(config.data.path).inputs, config.data.path, config.data)
        else:
            Trajectories(config.data.path)
