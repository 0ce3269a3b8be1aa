"""The identity of data: digests of all that a training reads, by split and component, and what can be said in words.

An identity is a dict of plain values, kept in a store's manifest and in checkpoints: ``velocity`` (stored or not), ``dt``
(the values), ``attributes`` (name → columns), ``digests`` (split → component → BLAKE2b). Components are position,
velocity, attributes/NAME, dt, box, periodic and gravity.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Data
from ..errors import Failure
from .store import open_store
from .trajectories import SPLITS, Trajectories, Trajectory

Identity = dict[str, Any]

WORDS = {"position": "positions", "velocity": "velocities"}


def of_file(data: Trajectories) -> Identity:
    """The identity of a trajectories file; reads all of it, in blocks."""
    hashes: dict[str, dict[str, Any]] = {}
    for k, trajectory in enumerate(data):
        split = hashes.setdefault(trajectory.split, {})
        plain = {"dt": trajectory.dt, "periodic": trajectory.periodic, "gravity": trajectory.gravity}
        box = data.box(k)
        plain["box"] = None if box is None else box.tolist()
        keys = ["position", *["velocity"] * trajectory.velocity, *(f"attributes/{a}" for a in trajectory.attributes)]
        for key in (*plain, *keys):
            digest = split.setdefault(key, hashlib.blake2b(digest_size=16))
            # the number of the trajectory: an attribute may be absent from some
            digest.update(json.dumps([k, trajectory.frames, trajectory.nodes, plain.get(key)]).encode())
            for block in data.blocks(k, key) if key in keys else ():
                digest.update(np.ascontiguousarray(block, "<f4"))
    return {
        "velocity": data[0].velocity,
        "dt": sorted({trajectory.dt for trajectory in data}),
        "attributes": dict(sorted((name, n) for trajectory in data for name, n in trajectory.widths.items())),
        "digests": {s: {key: h.hexdigest() for key, h in sorted(by_key.items())} for s, by_key in hashes.items()},
    }


def of_data(path: str | Path) -> Identity | None:
    """The identity of the store or trajectories file at a path. None, and a warning, for a store of an older version."""
    manifest = Path(path, "manifest.yaml")
    return _of_data(Path(path).absolute(), (manifest if manifest.is_file() else Path(path)).stat().st_mtime_ns)


@functools.lru_cache(8)
def _of_data(path: Path, _modified_ns: int) -> Identity | None:
    if path.is_dir():
        if (identity := open_store(path).manifest.get("data")) is None:
            remedy = "partition again to have it compared"
            print(
                f"warning: {path}: its manifest does not identify the data it was made from; {remedy}", file=sys.stderr
            )
        return identity
    file = Trajectories(path)
    identity = of_file(file)
    file.close()
    return identity


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
        return key != "velocity" or not data.history  # a simulator's are differences of positions

    pairs = [[identity["digests"].get(split, {}) for identity in (before, now)] for split in splits]
    keys = dict.fromkeys(key for was, new in pairs for key in ("position", *was, *new) if was.get(key) != new.get(key))
    return [WORDS.get(key) or re.sub("^attributes/(.*)", r"attribute '\1'", key) for key in keys if used(key)]


def check_fits(identity: Identity, trajectory: Trajectory, data: Data, where: str, run: Path) -> None:
    """Raise Failure unless a trajectory at ``where`` has velocities, attributes and dt such as the run was trained with."""
    listed = identity["attributes"] if data.features is None else data.features
    names = {name.partition("/")[0] for name in (*listed, *data.node_attributes)} & identity["attributes"].keys()
    known = ", ".join(trajectory.attributes) or "none"
    for name in sorted(names):
        width, columns = trajectory.widths.get(name), identity["attributes"][name]
        if width != columns:
            actual = f"no attribute '{name}' (it has: {known})" if width is None else f"{width} columns of '{name}'"
            raise Failure(f"{where}: {actual}, {run} was trained with {columns} columns of it; use data with the same")
    if trajectory.velocity != identity["velocity"] and not data.history:
        actual, trained = (
            ("stores velocities", "differences") if trajectory.velocity else ("has none", "stored velocities")
        )
        raise Failure(f"{where}: velocity: {actual}, {run} was trained with {trained}; use data with the same")
    if not any(math.isclose(trajectory.dt, dt, rel_tol=1e-5) for dt in identity["dt"]):
        trained = ", ".join(f"{dt:g}" for dt in identity["dt"][:4])
        raise Failure(f"{where}: dt is {trajectory.dt:g}, {run} was trained with dt={trained}; use data with the same")


def resolve_features(data: Data, identity: Identity | None) -> list[str] | None:
    """data.features, where null stands for all attributes of the training's data, then speed."""
    return data.features if data.features is not None or identity is None else [*identity["attributes"], "speed"]
