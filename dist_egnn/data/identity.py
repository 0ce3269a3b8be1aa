"""The identity of data: digests of all that a training reads, by split and component, and what can be said in words.

An identity is a dict of plain values, kept in a store's manifest and in checkpoints: ``velocity`` (stored or not), ``dt``
(the values), ``attributes`` (name → columns), ``velocity_ratio`` (see `_velocity_ratio`), ``digests`` (split → component
→ BLAKE2b). Components are position, velocity, attributes/NAME, edges, dt, box, periodic and gravity.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..config import Data
from ..errors import Failure
from ..utils.filesystem import replace_file
from .store import open_store
from .trajectories import SPLITS, Trajectories, Trajectory

Identity = dict[str, Any]

UNIT_FACTOR = 3.0  # between velocities of one unit, whose ratio to displacements depends a little on the motion
CACHED_BYTES = 1 << 24  # files of this size or more are hashed once per user: a GB takes about 10 s
WORDS = {"position": "positions", "velocity": "velocities"}


def _periodic(trajectory: Trajectory) -> bool | list[bool]:
    return list(trajectory.axes) if len({*trajectory.axes}) > 1 else trajectory.periodic


def of_file(data: Trajectories) -> Identity:
    """The identity of a trajectories file; reads all of it, in blocks."""
    hashes: dict[str, dict[str, Any]] = {}
    for k, trajectory in enumerate(data):
        split = hashes.setdefault(trajectory.split, {})
        plain = {"dt": trajectory.dt, "periodic": _periodic(trajectory), "gravity": trajectory.gravity}
        box = data.box(k)
        plain["box"] = None if box is None else box.tolist()
        keys = ["position", *["velocity"] * trajectory.velocity, *(f"attributes/{a}" for a in trajectory.attributes)]
        for key in (*plain, *keys):
            digest = split.setdefault(key, hashlib.blake2b(digest_size=16))
            # the number of the trajectory: an attribute may be absent from some
            digest.update(json.dumps([k, trajectory.frames, trajectory.nodes, plain.get(key)]).encode())
            for block in data.blocks(k, key) if key in keys else ():
                digest.update(np.ascontiguousarray(block, "<f4"))
        if trajectory.edges:
            digest = split.setdefault("edges", hashlib.blake2b(digest_size=16))
            digest.update(json.dumps([k, trajectory.nodes]).encode())
            digest.update(np.ascontiguousarray(data.edges(k), "<i8"))
    digests = {split: {key: h.hexdigest() for key, h in sorted(by_key.items())} for split, by_key in hashes.items()}
    return describe(data, range(len(data))) | {"digests": digests}


def describe(data: Trajectories, numbers: Sequence[int]) -> Identity:
    """An identity without digests, of the trajectories with these numbers."""
    chosen = [data[k] for k in numbers]
    widths = sorted((name, columns) for trajectory in chosen for name, columns in trajectory.widths.items())
    identity = {"velocity": chosen[0].velocity, "dt": sorted({t.dt for t in chosen}), "attributes": dict(widths)}
    return identity | {"velocity_ratio": _velocity_ratio(data, numbers)}


def _velocity_ratio(data: Trajectories, numbers: Sequence[int]) -> float | None:
    """rms(v) · dt over the rms displacement to the next frame: the median of four frames of up to eight trajectories, about
    1 if the units agree. None without stored velocities or without motion."""
    ratios = list[float]()
    for k in np.asarray(numbers)[np.unique(np.linspace(0, len(numbers) - 1, 8).round().astype(int))].tolist():
        if data[k].velocity and data[k].frames > 1:
            for t in np.unique(np.linspace(0, data[k].frames - 2, 4).round().astype(int)):
                moved = np.linalg.norm(data.position(k, t + 1).astype(float) - data.position(k, t))
                travelled = np.linalg.norm(data.velocity(k, t).astype(float)) * data[k].dt
                ratios += [float(travelled / moved)] if travelled * moved > 0 else []
    return float(f"{np.median(ratios):.4g}") if ratios else None


def of_data(path: str | Path) -> Identity | None:
    """The identity of the store or trajectories file at a path. None, and a warning, for a store of an older version."""
    manifest = Path(path, "manifest.yaml")
    file = manifest if manifest.is_file() else Path(path)
    return _of_data(Path(path), file.stat().st_mtime_ns if file.exists() else 0)


@functools.lru_cache(8)
def _of_data(path: Path, _modified_ns: int) -> Identity | None:
    if path.is_dir():
        if (identity := open_store(path).manifest.get("data")) is None:
            text = f"its manifest does not identify the data it was made from; {open_store(path).remedy}"
            print(f"warning: {path}: {text}", file=sys.stderr)
        return identity
    record, key = _cache(path)
    with suppress(OSError, ValueError, KeyError):
        if (saved := json.loads(record.read_text(encoding="utf-8")))["key"] == key:
            return saved["identity"]
    file = Trajectories(path)
    identity = of_file(file)
    file.close()
    if key and key == _cache(path)[1]:
        with suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            replace_file(record, json.dumps({"key": key, "identity": identity}).encode())
    return identity


def _cache(path: Path) -> tuple[Path, list[Any]]:
    """The file in the user's cache folder for the identity of a trajectories file, and what it is valid for: version, path,
    inode, size and time of modification. Nothing for small files, and those modified less than two seconds ago."""
    name = hashlib.blake2b(str(path.absolute()).encode(), digest_size=16).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    record, state = Path(home, "dist_egnn", f"{name}.json"), path.stat() if path.is_file() else None
    if state is None or state.st_size < CACHED_BYTES or time.time() - state.st_mtime < 2:
        return record, []
    return record, [__version__, str(path.absolute()), state.st_ino, state.st_size, state.st_mtime_ns]


def digest(identity: Identity | None) -> str:
    """One digest of all; empty for None."""
    text = json.dumps(identity and identity["digests"], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest() if identity else ""


def changes(before: Identity, now: Identity, data: Data, splits: Collection[str] = SPLITS) -> list[str]:
    """What of the splits that a data section uses has changed, in words: positions, velocities, attribute 'mass', …"""
    listed = None if data.features is None else {name.partition("/")[0] for name in data.features}
    more = {name.partition("/")[0] for name in data.node_attributes} | {data.fixed.partition("=")[0]}

    def used(key: str) -> bool:
        if key.startswith("attributes/"):
            return listed is None or key.removeprefix("attributes/") in listed | more
        if key == "edges":
            return data.edges == "given"
        return key != "velocity" or not data.history  # a simulator's are differences of positions

    pairs = [[identity["digests"].get(split, {}) for identity in (before, now)] for split in splits]
    keys = dict.fromkeys(key for was, new in pairs for key in ("position", *was, *new) if was.get(key) != new.get(key))
    return [WORDS.get(key) or re.sub("^attributes/(.*)", r"attribute '\1'", key) for key in keys if used(key)]


def check_fits(trained: Identity, given: Identity, data: Data, where: str, run: Path) -> None:
    """Raise Failure if data at ``where`` lack an attribute that a run uses, or differ in velocity or dt from those that it
    was trained with."""
    remedy = "use data with the same"
    names = {name.partition("/")[0] for name in (*(resolve_features(data, trained) or ()), *data.node_attributes)}
    for name in sorted(names & trained["attributes"].keys()):
        width, columns = given["attributes"].get(name), trained["attributes"][name]
        if width is None:
            known = ", ".join(given["attributes"]) or "none"
            raise Failure(f"{where}: has no attribute '{name}' (it has: {known}), which {run} uses; {remedy}")
        if width != columns:
            raise Failure(
                f"{where}: attribute '{name}' has {width} columns, {run} was trained with {columns}; {remedy}"
            )
    if given["velocity"] != trained["velocity"] and not data.history:
        stored = ("without stored velocities", "with stored velocities")
        actual = "stores velocities" if given["velocity"] else "stores no velocities"
        raise Failure(f"{where}: {actual}, {run} was trained {stored[trained['velocity']]}; {remedy}")
    own, ratio = trained.get("velocity_ratio"), given.get("velocity_ratio")  # older versions recorded none
    if own and ratio and not data.history and not 1 / UNIT_FACTOR < ratio / own < UNIT_FACTOR:
        text = f"velocity · dt is {ratio:g} times the displacement, in the data of {run} {own:g} times"
        raise Failure(f"{where}: {text}; store velocities in the unit of the training's")
    for dt in given["dt"]:
        if not any(math.isclose(dt, known, rel_tol=1e-5) for known in trained["dt"]):
            known = ", ".join(f"{value:g}" for value in trained["dt"][:4])
            raise Failure(f"{where}: dt is {dt:g}, {run} was trained with dt {known}; {remedy}")


def resolve_features(data: Data, identity: Identity | None) -> list[str] | None:
    """data.features, where null stands for all attributes of the training's data, then speed."""
    return data.features if data.features is not None or identity is None else [*identity["attributes"], "speed"]
