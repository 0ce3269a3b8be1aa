"""The configuration: typed keys, each with a comment (its help) and its valid values. Unknown keys are errors."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from .errors import Failure
from .utils import devices, typed_yaml

KERNELS = ("laplacian", "gaussian")  # of the MMD
SELECT = ("one_step", "rollout")
SCHEDULES = ("constant", "cosine", "plateau")
HALOS = ("bridge", "exchange")
WALLS = ("none", "box")
EDGES = ("radius", "knn", "given", "complete")
PREDICTS = ("position", "velocity", "acceleration")
DIFFERENCES = ("backward", "forward")
# what keys stood for before they existed: the published convention
PUBLISHED = {"data": {"velocity": "forward", "velocity_scale": "1"}}
PATHS = ("data.path", "run.dir", "train.kept", "train.select_data", "train.init")  # in these ~ is the home folder


# whether a key accepts a value, and the text of the error for a value that it does not accept
Rule = tuple[Callable[[Any], bool], str]


def _least(minimum: float) -> Rule:
    return (lambda value: value >= minimum), f"must be at least {minimum}"


def _choice(*names: str) -> Rule:
    return (lambda value: value in names), f"unknown; use {', '.join(names[:-1])} or {names[-1]}"


def _key(default: Any, comment: str, rule: Rule | None = None) -> Any:
    options: dict[str, Any] = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**options, metadata={"comment": comment, "rule": rule})


def _names_nodes(text: str) -> bool:
    """Whether a text is NAME or NAME=VALUE."""
    name, equals, value = text.partition("=")
    try:
        return bool(name) and (not equals or math.isfinite(float(value)))
    except ValueError:
        return False


POSITIVE = (lambda value: value > 0), "must be positive"
RADIUS = (lambda value: value > 0), "must be positive (.inf for the complete graph)"
CUTOFF = (lambda value: value is None or 0 < value < math.inf), "must be positive and finite, or null"
VECTOR = (
    (lambda value: value is None or (len(value) == 3 and all(map(math.isfinite, value)))),
    "must be 3 numbers, or null",
)
SCALE = (lambda value: value is None or 0 < value < math.inf), "must be positive and finite, or null"
FRACTION = (lambda value: 0 <= value <= 1), "must lie in 0 … 1"
DECAY = (lambda value: 0 <= value < 1), "must be at least 0 and below 1"
FIXED = (lambda value: value == "" or _names_nodes(value)), "write NAME, or NAME=VALUE as type=3, of a node attribute"
BACKEND = _choice("auto", "gloo", "nccl")
FACTOR = (lambda value: 0 < value < 1), "must lie between 0 and 1"


@dataclass
class Data:
    """Samples, made from the frames of trajectories. A store fixes these settings; a config with others is refused."""

    path: str = _key("", "trajectories.h5, or a store that `distegnn partition` wrote")
    edges: str = _key(
        "radius",
        "nodes within radius; knn: each with its nearest ones; given: edges of the file; complete",
        _choice(*EDGES),
    )
    radius: float = _key(math.inf, "edges join nodes up to this distance; .inf for the complete graph", RADIUS)
    neighbours: int = _key(0, "knn: in-edges of a node, from the nearest other nodes", _least(0))
    horizon: int = _key(10, "frames from input to target", _least(1))
    features: list[str] | None = _key(None, "node attributes, 'speed' or 'NAME/max'; null: all attributes and speed")
    node_attributes: list[str] = _key([], "node attributes that every layer reads (a)")
    edge_drop: float = _key(0.0, "fraction p of the longest edges to drop, 0 to 1", FRACTION)
    periodic: bool = _key(False, "also join nodes across the boundary of a periodic box, by the nearest image")
    fixed: str = _key(
        "", "nodes at rest, or moved by the data (simulator), not in loss and errors: NAME != 0, or NAME=VALUE", FIXED
    )
    history: int = _key(0, "simulator: past velocities in its input; 0: no simulator, one velocity (v)", _least(0))
    walls: str = _key(
        "none", "simulator: walls that it feels; none, or box: the sides of the trajectory's box", _choice(*WALLS)
    )
    gravity: list[float] | None = _key(None, "simulator: gravity, length/time^2; null: that of the file", VECTOR)
    pushforward: int = _key(0, "simulator: own steps before the input, in training", _least(0))
    velocity: str = _key(
        "backward",
        "v of a file without velocities: backward differences, or forward (published)",
        _choice(*DIFFERENCES),
    )
    velocity_scale: float | None = _key(
        None, "the model sees v times this; null: rms displacement / rms v; 1: as published", SCALE
    )
    frames: int = _key(0, "random input frames per trajectory; 0: all", _least(0))
    first_frame: int = _key(0, "first frame that may be an input", _least(0))
    last_frame: int = _key(-1, "last frame that may be an input; -1: the last one that has a target", _least(-1))
    frame_seed: int = _key(0, "seed of the choice of frames")


@dataclass
class Partition:
    """How several processes share a graph."""

    parts: int = _key(0, "processes that share a graph; 0: the parts of the store, 1 for trajectories.h5", _least(0))
    method: str = _key("metis", "metis, random, kmeans, spectral, bisection, morton; unused if data.path is a store")
    seed: int = _key(0, "seed of the random methods")
    weights: list[float] | None = _key(None, "shares of the processes, as [2, 1, 1]; null: equal, or the store's")
    halo: str = _key("bridge", "edges between parts; bridge: drop them; exchange: send halo nodes", _choice(*HALOS))


@dataclass
class Model:
    """The network."""

    name: str = _key("FastEGNN", "Linear, EGNN, FastEGNN, RF, FastRF, SchNet, FastSchNet, TFN, FastTFN, MODULE:CLASS")
    as_published: bool = _key(
        False, "EGNN, RF, SchNet: the form that the authors' experiments ran; normalize does not apply"
    )
    predicts: str = _key("position", "position; simulator: velocity or acceleration", _choice(*PREDICTS))
    hidden: int = _key(64, "width H of the hidden features", _least(1))
    layers: int = _key(4, "layers L", _least(1))
    virtual_nodes: int = _key(3, "virtual nodes C, for models that have them", _least(1))
    virtual_messages: str = _key(
        "mean",
        "what phi_h reads of the m_ic: their mean over c, or concat: all C (FastEGNN of 2024)",
        _choice("mean", "concat"),
    )
    normalize: bool = _key(False, "divide x_i - x_j by its length")
    attention: bool = _key(False, "weight messages by a learned gate")
    tanh: bool = _key(False, "bound phi_x, phi_xv and phi_z by tanh")
    basis: int = _key(20, "SchNet, TFN: radial basis functions of the distance", _least(1))
    cutoff: float | None = _key(None, "SchNet, TFN: cutoff of the basis; null: data.radius, 10 if .inf", CUTOFF)
    channels: int = _key(16, "TFN: vector features (degree 1) per node", _least(1))
    gravity: list[float] | None = _key(None, "constant vector g: adds phi_g(h) g, equivariant about g only", VECTOR)
    precision: str = _key("float32", "float32, or bf16-messages: messages in bfloat16, positions in float32")
    engine: str = _key("auto", "message passing: native, torch, dgl or auto (native where it applies, else torch)")
    tile: int = _key(8192, "edges per tile, rows of the largest arrays; less takes less memory", _least(1))


@dataclass
class Loss:
    """MSE + mmd * MMD."""

    mmd: float = _key(0.01, "weight of the MMD of virtual nodes and targets, which can be negative; 0: none", _least(0))
    sigma: float = _key(1.5, "width of the kernel", POSITIVE)
    samples: int = _key(3, "targets sampled per virtual node", _least(1))
    kernel: str = _key("laplacian", "laplacian (the authors' code) or gaussian (the paper)", _choice(*KERNELS))


@dataclass
class Train:
    """The optimization."""

    init: str = _key("", "run or checkpoint whose weights the training starts from; empty: random weights")
    epochs: int = _key(100, "passes over the training split", _least(1))
    batch_size: int = _key(1, "snapshots per batch", _least(1))
    accumulate: int = _key(1, "batches per optimizer step", _least(1))
    replicas: int = _key(1, "process groups, each with whole graphs, that share the batches of a step", _least(1))
    lr: float = _key(5e-4, "learning rate of Adam", _least(0))
    schedule: str = _key("constant", "learning rate: constant, cosine (to zero), plateau", _choice(*SCHEDULES))
    warmup: float = _key(0.0, "epochs, possibly a fraction, over which the learning rate rises to lr", _least(0))
    plateau_epochs: int = _key(10, "plateau: epochs without a better validation MSE before lr is reduced", _least(1))
    plateau_factor: float = _key(0.5, "plateau: factor of the reduction", FACTOR)
    weight_decay: float = _key(1e-12, "weight decay of Adam", _least(0))
    ema: float = _key(0.0, "decay of the averaged weights, which are validated and saved; 0: no average", DECAY)
    clip: float = _key(0.0, "maximum norm of the gradient; 0: no clipping", _least(0))
    patience: int = _key(0, "epochs without a better validation MSE before training stops; 0: never", _least(0))
    valid_interval: int = _key(1, "epochs from one validation to the next; the last epoch is validated", _least(1))
    select: str = _key(
        "one_step", "error that chooses best.pt: one_step, or rollout, of validation trajectories", _choice(*SELECT)
    )
    select_steps: int = _key(20, "steps of these rollouts", _least(1))
    select_data: str = _key("", "their trajectories.h5; empty: data.path, or the file beside the store made from it")
    noise: float = _key(
        0.0, "simulator: random walk in an input's velocities, rms of the newest, length/step", _least(0)
    )
    pushforward_start: float = _key(0.8, "share of the epochs after which half of the inputs begin earlier", FRACTION)
    callbacks: list[str] = _key([], "functions MODULE:FUNCTION(row, model) to call at the end of each epoch, on rank 0")
    seed: int = _key(0, "seed of weights, order and sampling")
    device: str = _key("cpu", "cpu, cuda:N, cuda (one device per process, in turn), or auto: cuda if available")
    backend: str = _key(
        "auto", "sums of CUDA tensors: gloo (by the host), nccl (a device per process), auto: nccl if possible", BACKEND
    )
    threads: int = _key(1, "threads of each process on a CPU; the results are the same bits for any number", _least(1))
    timeout_s: float = _key(60.0, "seconds that a process waits for the others before it fails", _least(1))
    kept: str = _key("", "folder for activations that the backward pass needs; empty: keep them in memory")
    checkpoint_minutes: float = _key(10.0, "minutes between checkpoints in an epoch; 0: after every step", _least(0))


@dataclass
class Run:
    """Where results go."""

    dir: str = _key("runs/run", "folder of checkpoints, metrics.csv, TensorBoard events, config.yaml, about.yaml")


@dataclass
class Config:
    """All sections."""

    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)
    run: Run = field(default_factory=Run)


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in fields(Config)}


def keys() -> list[str]:
    """Every key in dotted form."""
    return [f"{section}.{f.name}" for section, kind in SECTIONS.items() for f in fields(kind)]


def check(config: Config) -> None:
    """Raise Failure for a value that its key does not accept, and for keys that contradict each other."""
    for section, kind in SECTIONS.items():
        for f in fields(kind):
            value, rule = getattr(getattr(config, section), f.name), f.metadata["rule"]
            if rule and not rule[0](value):
                raise Failure(f"{section}.{f.name}={value}: {rule[1]}")
    d, p, t = config.data, config.partition, config.train
    devices.check_name(t.device, "train.device=", "auto")
    if p.weights is not None:
        from .utils import part_weights  # here: it imports numpy

        part_weights.validate(p.weights, p.parts or len(p.weights))
    _check_edges(d)
    _check_simulator(config)
    if 0 <= d.last_frame < d.first_frame:
        raise Failure(f"data.last_frame={d.last_frame}: lies before data.first_frame={d.first_frame}")
    if t.replicas > t.accumulate:
        remedy = f"set train.accumulate={t.replicas} and a smaller train.batch_size"
        raise Failure(f"train.replicas={t.replicas}: more than the batches of a step, train.accumulate; {remedy}")
    if t.warmup >= t.epochs:
        raise Failure(f"train.warmup={t.warmup}: must be shorter than train.epochs={t.epochs}")
    if t.schedule == "plateau" and 0 < t.patience <= t.plateau_epochs:
        remedy = f"set it above train.plateau_epochs={t.plateau_epochs}"
        raise Failure(f"train.patience={t.patience}: training would stop before the learning rate falls; {remedy}")


def _check_edges(data: Data) -> None:
    """Raise Failure for keys that data.edges does not read, and for a missing one."""
    if data.edges == "knn" and not data.neighbours:
        raise Failure(
            "data.neighbours=0: data.edges=knn needs the number of in-edges of a node; set data.neighbours=12"
        )
    if data.edges != "knn" and data.neighbours:
        raise Failure(f"data.neighbours={data.neighbours}: is an option of data.edges=knn; leave it out")
    if data.edges != "radius" and math.isfinite(data.radius) and not data.history:
        raise Failure(f"data.radius={data.radius}: data.edges={data.edges} has no radius; leave it out")


def follows_from_data(data: Data, name: str) -> bool:
    """Whether the data determine a key of the data section that is left out."""
    if name == "radius":  # the unit of length of a simulator whose edges have no radius
        return bool(data.history) and data.edges != "radius" and math.isinf(data.radius)
    return name in ("features", "velocity_scale") and getattr(data, name) is None


def _check_simulator(config: Config) -> None:
    """Raise Failure for keys of a simulator without data.history, and for keys that a simulator does not have."""
    defaults = Config()
    simulator = ("data.walls", "data.gravity", "data.pushforward", "model.predicts", "train.noise")
    if not config.data.history:
        for key in simulator:
            if (value := attrgetter(key)(config)) != attrgetter(key)(defaults):
                raise Failure(f"{key}={value}: is an option of a simulator; set data.history to 1 or more")
        return
    if config.data.edges == "radius" and math.isinf(config.data.radius):
        raise Failure("data.radius=.inf: a simulator (data.history) needs a finite radius")
    if config.data.velocity_scale not in (None, 1):
        scale = config.data.velocity_scale
        raise Failure(f"data.velocity_scale={scale}: a simulator (data.history) scales velocities itself; leave it out")
    if config.model.gravity is not None:
        raise Failure(
            f"model.gravity={config.model.gravity}: a simulator reads data.gravity, in length/time²; set that"
        )
    if config.data.edge_drop and (config.train.noise or config.data.pushforward):
        raise Failure(f"data.edge_drop={config.data.edge_drop}: not with train.noise or data.pushforward; set it to 0")


def _unknown_key(key: str, source: str) -> Failure:
    known, leaf = keys(), key.rsplit(".", 1)[-1]
    similar = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [k for k in known if k.endswith(f".{leaf}")]
    hint = f"did you mean {similar[0]}?" if similar else "see `distegnn config` for all keys"
    return Failure(f"{source}: unknown key '{key}'; {hint}")


def convert(key: str, given: Any, source: str) -> Any:
    """The value of a key from text, or from a list of text. Raises Failure that names ``source`` and the key."""
    section, _, name = key.partition(".")
    try:
        value = typed_yaml.convert(given, get_type_hints(SECTIONS[section])[name])
    except ValueError as error:
        shown = given if isinstance(given, str) else json.dumps(given)
        raise Failure(f"{source}: {key}={shown}: {error}") from error
    return os.path.expanduser(value) if key in PATHS else value


def _merge(config: Config, given: Any, source: str) -> None:
    """Set the keys of ``given``: sections of keys with text. source: a file or an override."""
    if not isinstance(given, dict):
        raise Failure(f"{source}: a config is a mapping of sections, see `distegnn config`")
    for section, entries in given.items():
        if section not in SECTIONS:
            raise _unknown_key(str(section), source)
        if not isinstance(entries, dict):
            raise Failure(f"{source}: '{section}' is a section; name a key in it: {section}.KEY=VALUE")
        for name, value in entries.items():
            key = f"{section}.{name}"
            if key not in keys():
                raise _unknown_key(key, source)
            setattr(getattr(config, section), name, convert(key, value, source))


def read_yaml(content: str | bytes, source: str) -> Any:
    """Nested dicts and lists of text, which `convert` reads. Raises Failure that names ``source``."""
    try:
        return typed_yaml.read(content)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise Failure(f"{source}: not readable as YAML ({problem})") from error


def _read_override(override: str) -> tuple[Any, str]:
    """The nested key of ``KEY=VALUE``, and the source of its errors. The value of a list, and quoted text, is YAML."""
    key, equals, value = override.partition("=")
    if not equals:
        raise Failure(f"override '{override}': write key=value, for example train.epochs=10")
    source = f"override '{override}'"
    is_yaml = value.startswith("[") or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\"")
    given: Any = read_yaml(value, source) if is_yaml else value
    section, dot, name = key.partition(".")
    return ({section: {name: given}} if dot else {section: given}), source


def _to_text(value: Any) -> str:
    """A Python value as an override writes it."""
    if value is None:
        return "null"
    return json.dumps([*value]) if isinstance(value, list | tuple) else str(value)


def _read_files(path: Path, including: tuple[Path, ...] = ()) -> list[tuple[Any, str]]:
    """The contents of a config file and of the files that it includes, with their names; later ones take precedence."""
    if str(path).partition("=")[0] in keys() and not path.exists():
        raise Failure(f"override '{path}': there is no config before it; name one first: CONFIG {path}")
    if path.suffix == ".h5" or (path / "manifest.yaml").is_file():
        raise Failure(f"{path}: data, not a config; name a config first, and then data.path={path}")
    if (path / "config.yaml").is_file():
        raise Failure(f"{path}: the folder of a run, not a config; its config is {path / 'config.yaml'}")
    if not path.is_file():
        included = f" (include of {including[-1]})" if including else ""
        raise Failure(f"{path}: no such config file{included}; `distegnn config > my.yaml` writes one to start from")
    if path.resolve() in [file.resolve() for file in including]:
        raise Failure(f"{including[-1]}: include: {path}: the files include each other in a cycle; remove one include")
    given = read_yaml(path.read_bytes(), str(path))
    given = {} if given in (None, "") else given  # an empty file
    if not isinstance(given, dict) or "include" not in given:
        return [(given, str(path))]
    base = given.pop("include")
    if not isinstance(base, str) or not base:
        raise Failure(f"{path}: include: must name one config file, relative to this one, not {base!r}")
    return [*_read_files(path.parent / os.path.expanduser(base), (*including, path)), (given, str(path))]


def _build(layers: Sequence[tuple[Any, str]]) -> Config:
    """The defaults updated by the layers in turn, checked."""
    config = Config()
    for given, source in layers:
        _merge(config, given, source)
    check(config)
    return config


def load(
    path: str | Path | None, overrides: Sequence[str] | Mapping[str, Any] = (), *, published: bool = False
) -> Config:
    """The config of a YAML file and its include, or the defaults, updated by overrides. Raises Failure.

    overrides: texts key=value, or values by key, as {"train.epochs": 10}.
    published: keys of PUBLISHED that are left out have its values, as in runs of older versions.
    """
    layers = [(PUBLISHED, "")] if published else []
    layers += _read_files(Path(path)) if path is not None else []
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={_to_text(value)}" for key, value in overrides.items()]
    return _build([*layers, *map(_read_override, overrides)])


def parse(text: str, source: str) -> Config:
    """The config in a text that `to_yaml` wrote. Raises Failure that names ``source`` and the key."""
    return _build([(PUBLISHED, ""), (read_yaml(text, source), source)])


def differences(before: Config, after: Config, ignore: Collection[str] = ()) -> list[tuple[str, Any, Any]]:
    """(key, value before, value after) of each key whose value differs, except those in ``ignore``.

    A key that training replaces by a number agrees with any.
    """
    numbers = {f"data.{name}" for name in ("velocity_scale", "radius") if follows_from_data(after.data, name)}
    values = ((key, *map(attrgetter(key), (before, after))) for key in keys() if key not in ignore)
    return [(k, was, now) for k, was, now in values if was != now and k not in numbers]


def to_yaml(config: Config) -> str:
    """The config as YAML, every key with its comment."""
    lines = []
    for section, kind in SECTIONS.items():
        lines.append(f"{section}:  # {(kind.__doc__ or '').splitlines()[0]}")
        part = getattr(config, section)
        for f in fields(part):
            # flow style keeps a list on its line, before the comment
            value = yaml.safe_dump({f.name: getattr(part, f.name)}, default_flow_style=True, width=10**6).strip()[1:-1]
            lines.append(f"  {value}  # {f.metadata['comment']}")
    return "\n".join(lines) + "\n"
