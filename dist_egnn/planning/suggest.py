"""A config to start from, suggested by what an inspection of the data found; each key with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..config import Config
from ..errors import Failure
from ..evaluate.inspection import Inspection
from ..train import preflight
from ..utils import memory, resources

Line = tuple[str, Any, str]  # key, value, reason

HISTORY, PUSHFORWARD = 2, 2  # of recipes/fluid113k/simulator.yaml
SMOOTH = 0.1  # of the static error, that the last step's velocity may leave: frames resolve the motion
CURVED = 0.25  # from which share on a horizon is worth learning
SAMPLES = 2000  # training inputs of an epoch
EXACT = 1e-8  # of the static error, left by rounding
NODES = 10_000  # of a process; with fewer the sums between processes cost more than they save
BATCH_NODES = 2000
VALUES = 16  # different values of an attribute that may name fixed nodes
MESH = 4  # neighbours of a node in the edges of a file, from which they are a mesh rather than bonds
LARGE = 30.0  # magnitude of a feature from which it is scaled


def suggest(found: Inspection) -> list[Line]:
    """The keys that differ from their defaults or depend on the data. Raises Failure for data that no run can learn from."""
    frames, first = min(t.frames for t in found.file), 0 if found.file[0].velocity else 1
    path = found.file.path
    if missing := {"train", "valid"} - {t.split for t in found.file}:
        raise Failure(f"{path}: no trajectory in split '{min(missing)}'; import it again with --split")
    if frames < 2 + first:
        raise Failure(f"{path}: a trajectory of {frames} frames has no input with a target; import longer ones")
    if not np.nansum(found.errors["static"]) > 0:
        raise Failure(f"{path}: no node moves in the sampled frames: there is nothing to learn")
    if np.nanmax(found.unexplained) <= EXACT:
        raise Failure(f"{path}: all nodes move in straight lines at constant speed: there is nothing to learn")
    if found.radius[0] < 1e-20:
        raise Failure(f"{path}: nodes coincide with others, so no radius finds neighbours; correct the positions")
    lines: list[Line] = [("data.path", str(path), "")]
    simulator = not (against := _against_simulator(found, frames))
    lines += _edges(found)
    lines += _simulator(found, frames) if simulator else _one_shot(found, frames - 1 - first, against)
    if all(t.periodic for t in found.file):
        thin = "the periodic box is too thin for neighbours within half a side; see distegnn import --repeat"
        lines.append(("data.periodic", not found.thin, thin if found.thin else "all boxes are periodic"))
    lines += _features(found, simulator)
    lines += _fixed(found, simulator)
    lines += _size(found, lines)
    name = found.file.path.stem
    folder = next(f for n in range(1, 10_000) if not (f := Path("runs", f"{name}-{n}" if n > 1 else name)).exists())
    return [*lines, ("run.dir", str(folder), "")]


def _edges(found: Inspection) -> Iterator[Line]:
    radius, mean = found.radius
    if found.given_degree >= MESH:
        yield "data.edges", "given", f"the file gives {found.given_degree:.2g} neighbours of a node, as a mesh has"
        return
    few = "the graphs have few nodes: every pair is joined"
    text = f"about {mean:.0f} neighbours of a node" if radius < math.inf else few
    text += "; as far as the periodic box allows" * found.limited
    yield "data.radius", radius, text + "; the file also gives edges: data.edges=given" * (found.given_degree > 0)


def _against_simulator(found: Inspection, frames: int) -> str:
    """Why a simulator does not fit; empty if it does: the last velocity predicts the next frame, less than a spacing away."""
    if math.isinf(found.radius[0]):
        return "the graphs have few nodes"
    if frames < HISTORY + 2:
        return f"trajectories of {frames} frames are too short for a simulator"
    if found.unexplained[0] > SMOOTH:
        return f"constant velocity leaves {found.unexplained[0]:.0%} of the static error after one frame"
    if (step := math.sqrt(3 * found.errors["static"][0])) > found.spacing:
        return f"a frame moves nodes by {step / found.spacing:.2g} spacings, too far for a simulator"
    return ""


def _simulator(found: Inspection, frames: int) -> Iterator[Line]:
    errors, left = found.errors["static"], found.unexplained
    usable = [
        n for n, h in enumerate(found.horizons)
        if left[n] <= SMOOTH and math.sqrt(3 * errors[n]) <= 0.1 * found.spacing and (2 * HISTORY + 2) * h < frames
    ]  # fmt: skip
    n = max(usable, default=0)
    horizon, step = found.horizons[n], math.sqrt(3 * errors[n])
    moved = f"a step moves nodes by {step / found.spacing:.2g} spacings"
    yield "data.horizon", horizon, f"{moved}; constant velocity explains {1 - left[n]:.1%} of it"
    other = next((h for h, share in zip(found.horizons, left, strict=True) if share >= CURVED), found.horizons[-1])
    only = f"to predict {other} frames ahead and no rollout, a one-shot model fits better (history 0, horizon {other})"
    yield "data.history", HISTORY, f"a simulator, for rollouts; {only}"
    if (HISTORY + PUSHFORWARD + 1) * horizon < frames:
        yield "data.pushforward", PUSHFORWARD, "own steps in training keep rollouts stable"
    if found.inside:
        yield "data.walls", "box", "the box is not periodic and all nodes that move stay inside"
    if (g := found.gravity) and g.of:  # else the file has it
        where = f"in {g.places} of {g.of} frames"
        yield "data.gravity", g.vector, f"mean acceleration {where}; delete this line if no such force acts"
    yield "model.name", "EGNN", "virtual nodes gain little over one short step"
    yield "model.predicts", "acceleration", "the deviation from free flight"
    yield "model.normalize", True, "as in the measured recipe of a fluid"
    yield "loss.mmd", 0.0, "no virtual nodes"
    yield "train.noise", float(f"{0.01 * step / math.sqrt(3):.1g}"), "1% of the rms displacement of a step"
    yield "train.clip", 1.0, "long gradients of collisions"


def _one_shot(found: Inspection, longest: int, against: str) -> Iterator[Line]:
    static, left = found.errors["static"], found.unexplained
    usable = [n for n, h in enumerate(found.horizons) if h <= max(1, longest // 2)]
    if left[0] >= 1:
        n = max(n for n in usable if found.horizons[n] <= 10)
    else:
        n = next((n for n in usable if left[n] >= CURVED), usable[-1])
    text = f"one-shot, since {against}; at this horizon constant velocity leaves {left[n]:.0%}"
    yield "data.horizon", found.horizons[n], text
    if g := found.gravity:
        length = float(np.linalg.norm(g.vector))
        if length > 0:
            yield "model.gravity", [round(v / length, 3) + 0.0 for v in g.vector], f"direction of gravity, {g.vector}"
    if static[n] < 0.1:
        text = f"a tenth of the static error, {static[n]:.2g}: the default is for displacements near 1"
        yield "loss.mmd", float(f"{0.1 * static[n]:.1g}"), text


def _features(found: Inspection, simulator: bool) -> Iterator[Line]:
    """data.features: the attributes that all trajectories have, except constants and numbers of nodes."""
    file = found.file
    common = set.intersection(*(set(t.attributes) for t in file))
    names, reasons = list[str](), list[str]()
    for name in sorted({name for t in file for name in t.attributes}):
        if name not in common or len({t.widths[name] for t in file}) > 1:
            reasons.append(f"'{name}' differs between trajectories")
            continue
        columns = [file.attribute(k, name, 0) for k in found.numbers]
        values = np.concatenate([column.reshape(len(column), -1) for column in columns])
        varies = any(name in t.varying for t in file)
        if not varies and (values.min(0) == values.max(0)).all():
            reasons.append(f"'{name}' is constant")
        elif values.shape[1] == 1 and all(_numbers_nodes(column) for column in columns):
            reasons.append(f"'{name}' numbers the nodes")
        else:
            names.append(f"{name}/max" if np.sqrt(np.square(values, dtype=float).mean()) > LARGE else name)
            if varies:
                reasons.append(f"'{name}' varies: rollouts end with the data")
    names += [] if simulator else ["speed"]
    yield "data.features", names, "; ".join(reasons) or "attributes of the nodes" * bool(common)


def _numbers_nodes(values: np.ndarray) -> bool:
    """Whether an attribute (N,) has a different whole number for each node."""
    return len(values) > VALUES and (values == np.rint(values)).all() and len(np.unique(values)) == len(values)


def _fixed(found: Inspection, simulator: bool) -> Iterator[Line]:
    """data.fixed: the attribute, or value of one, that marks most of the nodes at rest and no other node; or `fixed`."""
    file, marked = found.file, dict[str, int]()
    at_rest = sum(int(fixed.sum()) for fixed in found.fixed)
    plain = [n for n in file[0].attributes if all(t.widths.get(n) == 1 and n not in t.varying for t in file)]
    for name in plain if at_rest else ():
        columns = [file.attribute(k, name) for k in found.numbers]
        values = np.unique(np.concatenate(columns))[:VALUES].tolist()
        choices = {name: [column != 0 for column in columns]}
        choices |= {f"{name}={v:g}": [column == float(f"{v:g}") for column in columns] for v in values}
        for text, masks in choices.items():
            pairs = list(zip(masks, found.fixed, strict=True))
            if not any((mask & ~fixed).any() for mask, fixed in pairs):
                marked[text] = sum(int(mask.sum()) for mask in masks)
    best = max(marked, key=lambda text: (marked[text], text == "fixed"), default="")
    if best and marked[best] > at_rest / 2 and not all(fixed.all() for fixed in found.fixed):
        yield "data.fixed", best, f"these {marked[best] // len(found.numbers):,} nodes of a trajectory never move"
    elif simulator and "fixed" in plain and any(file.attribute(k, "fixed").any() for k in found.numbers):
        yield "data.fixed", "fixed", "marked in the file; they move as the data prescribe"


def _size(found: Inspection, lines: list[Line]) -> Iterator[Line]:
    """Frames, batch and parts by number of inputs, nodes, memory and cores."""
    given = {key: value for key, value, _ in lines}
    train = [t for t in found.file if t.split == "train"]
    usable = sum(t.frames for t in train) - len(train) * int(given["data.horizon"])
    if usable > SAMPLES:
        text = f"random inputs of a trajectory, of about {usable // len(train):,}: an epoch has {SAMPLES:,} samples or less"
        yield "data.frames", max(1, SAMPLES // len(train)), text
    nodes = max(t.nodes for t in found.file)
    batch = min(BATCH_NODES // nodes, usable // 10)
    if batch > 1:
        yield "train.batch_size", batch, f"graphs of {nodes} nodes are small"
    config = Config()
    config.train.batch_size, cores = max(batch, 1), max(1, int(resources.available_cores()))
    degree = found.given_degree if given.get("data.edges") else found.radius[1]
    edges, free = nodes * degree, memory.available_memory()
    parts = max(1, min(cores, nodes // NODES))
    total = parts * preflight.training_bytes(config, nodes / parts, edges / parts)
    text = f"{nodes:,} nodes on {cores} cores, about {total / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free"
    if total > free:
        text += ": too much, see train.kept and `distegnn launch`"
    yield "partition.parts", parts, text
    if parts > 1 and given.get("model.name") == "EGNN":
        yield "partition.halo", "exchange", "without virtual nodes, parts need the edges between them"


def to_yaml(lines: list[Line], header: list[str]) -> str:
    """The lines as a config by section, reasons as comments. header: lines of comment."""
    text, sections = [f"# {line}" for line in header], dict[str, list[str]]()
    for key, value, reason in lines:
        section, _, name = key.partition(".")
        entry = yaml.safe_dump({name: value}, default_flow_style=True, width=10**6).strip()[1:-1]
        sections.setdefault(section, []).append(f"  {entry}" + (f"  # {reason}" if reason else ""))
    order = ["data", "partition", "model", "loss", "train", "run"]
    for section in sorted(sections, key=order.index):
        text += [f"{section}:", *sections[section]]
    return "\n".join(text) + "\n"
