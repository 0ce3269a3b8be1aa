"""The configuration: typed, commented, strict. Every key's comment is its help; unknown keys and wrong types are errors."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import Failure

KERNELS = ("laplacian", "gaussian")  # of the MMD
SCHEDULES = ("constant", "cosine", "plateau")
HALOS = ("bridge", "exchange")


def _key(default: Any, comment: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"comment": comment})
    return field(default=default, metadata={"comment": comment})


@dataclass
class Data:
    """How frames become samples. A store was made with such settings; a config that names others is refused."""

    path: str = _key("", "trajectories.h5, or a store that `distegnn partition` wrote")
    radius: float = _key(math.inf, "edges join nodes up to this distance; .inf for the complete graph")
    horizon: int = _key(10, "frames from input to target (Δt)")
    features: list[str] | None = _key(
        None, "node attributes by name, 'speed', 'NAME/max'; null: all attributes and speed"
    )
    node_attributes: list[str] = _key([], "node attributes that every layer reads (a)")
    edge_drop: float = _key(0.0, "share p of the longest edges to drop, 0 … 1")
    periodic: bool = _key(False, "edges also across the boundary of the trajectory's periodic box, to nearest images")
    frames: int = _key(0, "random input frames per trajectory; 0: all")
    first_frame: int = _key(0, "first frame that may be an input")
    last_frame: int = _key(-1, "last frame that may be an input; -1: as far as targets exist")
    frame_seed: int = _key(0, "seed of the choice of frames")


@dataclass
class Partition:
    """How one graph is shared by several processes."""

    parts: int = _key(0, "processes that share each graph; 0: as many as the store has parts, 1 for trajectories.h5")
    method: str = _key(
        "metis", "metis, random, kmeans, spectral, bisection or morton (used when data.path is no store)"
    )
    seed: int = _key(0, "seed of the methods that draw")
    weights: list[float] | None = _key(
        None,
        "what each process is to own of a graph, one number a process, as [2, 1, 1]; null: equal, or as the store's",
    )
    halo: str = _key(
        "bridge",
        "bridge: edges between parts are left out, virtual nodes carry what crosses; exchange: they are kept, which costs messages",
    )


@dataclass
class Model:
    """The network."""

    name: str = _key(
        "FastEGNN",
        "Linear; EGNN, RF, SchNet or TFN; with virtual nodes FastEGNN, FastRF, FastSchNet or FastTFN (on several parts: Dist…); "
        "or MODULE:CLASS of your own",
    )
    hidden: int = _key(64, "width H of the hidden features")
    layers: int = _key(4, "layers L")
    virtual_nodes: int = _key(3, "virtual nodes C, where the model has them")
    normalize: bool = _key(False, "divide x_i - x_j by its length")
    attention: bool = _key(False, "weigh messages by a learned gate")
    tanh: bool = _key(False, "bound φ_x by tanh")
    basis: int = _key(20, "radial functions of the distance, in SchNet's filters and TFN's weights")
    cutoff: float | None = _key(
        None, "distance up to which they reach; null: data.radius, or 10 for the complete graph"
    )
    channels: int = _key(16, "features of degree 1 (vectors) of a node, in TFN")
    gravity: list[float] | None = _key(None, "a constant vector g; adds φ_g(h) g: equivariance then holds about g only")
    precision: str = _key(
        "float32", "float32, or bf16-messages: products of messages in bfloat16, positions as they are"
    )
    engine: str = _key("auto", "dgl, torch or auto (torch, the faster): what runs the messages")
    tile: int = _key(8192, "edges of a block, rows of the largest arrays; smaller takes less memory")


@dataclass
class Loss:
    """MSE + mmd · MMD."""

    mmd: float = _key(0.01, "weight λ of the MMD of virtual nodes and targets; 0: none")
    sigma: float = _key(1.5, "its kernel's width σ")
    samples: int = _key(3, "targets sampled for it, per virtual node")
    kernel: str = _key("laplacian", "laplacian (the authors' runs) or gaussian (the paper's formula)")


@dataclass
class Train:
    """The optimisation."""

    epochs: int = _key(100, "passes over the training split")
    batch_size: int = _key(1, "snapshots a batch")
    accumulate: int = _key(1, "batches a step of the optimiser")
    replicas: int = _key(
        1, "groups of processes, each with the whole graph, that share the batches of a step: at most train.accumulate"
    )
    lr: float = _key(5e-4, "learning rate of Adam")
    schedule: str = _key(
        "constant", "of the rate: constant; cosine (to zero over the epochs); plateau (falls when stuck)"
    )
    warmup: float = _key(0.0, "epochs, or a part of one, over which the rate rises to lr, step by step")
    plateau_epochs: int = _key(10, "plateau: epochs without a better validation MSE after which the rate falls")
    plateau_factor: float = _key(0.5, "plateau: what it is multiplied by")
    weight_decay: float = _key(1e-12, "Adam's weight decay")
    clip: float = _key(0.0, "largest norm of the gradient; 0: no clipping")
    patience: int = _key(0, "epochs without a better validation MSE before training stops; 0: never")
    seed: int = _key(0, "seed of weights, order and sampling")
    device: str = _key("cpu", "cpu, cuda:N, cuda (each process the next one), or auto: cuda if there is one")
    timeout_s: float = _key(60.0, "how long a process waits for the others before it gives up")
    kept: str = _key("", "folder where what a forward pass keeps for the backward pass lies; empty: in memory")
    checkpoint_minutes: float = _key(10.0, "time between checkpoints inside an epoch; 0: one after every step")


@dataclass
class Run:
    """Where results go."""

    dir: str = _key("runs/run", "folder of checkpoints, metrics.csv, TensorBoard events, config.yaml, about.yaml")


@dataclass
class Config:
    """All of it."""

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


def _unknown(key: str, where: str) -> Failure:
    known = keys()
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    leaf = key.rsplit(".", 1)[-1]
    near = near or [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    hint = f"did you mean {near[0]}?" if near else "see `distegnn config` for all keys"
    return Failure(f"{where}: unknown key '{key}'; {hint}")


def _merge(config: Any, given: Any, where: str) -> Any:
    """Merge one layer in, key by key, so that an error names the key."""
    try:
        plain = OmegaConf.to_container(given, resolve=True)
    except OmegaConfBaseException as error:
        raise Failure(f"{where}: {str(error).splitlines()[0]}") from error
    if not isinstance(plain, dict):
        raise Failure(f"{where}: a config is a mapping of sections, see `distegnn config`")
    known = set(keys())
    for section, entries in plain.items():
        if section not in SECTIONS:
            raise _unknown(str(section), where)
        if not isinstance(entries, dict):
            raise Failure(f"{where}: '{section}' is a section; name a key in it: {section}.KEY=VALUE")
        for name, value in entries.items():
            key = f"{section}.{name}"
            if key not in known:
                raise _unknown(key, where)
            try:
                OmegaConf.update(config, key, value)
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                raise Failure(f"{where}: {key}={value!r}: {reason}") from error
    return config


def _layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Any, str]]:
    """A file's contents with its name, after those of the file it includes, and so on: later ones win."""
    if path.suffix == ".h5" or (path / "manifest.yaml").is_file():
        raise Failure(f"{path}: data, not a config; name a config first, and then data.path={path}")
    if (path / "config.yaml").is_file():
        raise Failure(f"{path}: the folder of a run, not a config; its config is {path / 'config.yaml'}")
    if not path.is_file():
        by = f" (include of {above[-1]})" if above else ""
        raise Failure(f"{path}: no such config file{by}; `distegnn config > my.yaml` writes one to start from")
    if path.resolve() in [file.resolve() for file in above]:
        raise Failure(f"{above[-1]}: include: {path}: the files include each other in a circle; take one include out")
    try:
        given = OmegaConf.load(path)
    except Exception as error:  # whatever the YAML reader raises
        raise Failure(f"{path}: not readable as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(given, DictConfig) or "include" not in given:
        return [(given, str(path))]
    base = given.pop("include")
    if not isinstance(base, str) or not base:
        raise Failure(f"{path}: include: must name one config file, relative to this one, not {base!r}")
    return [*_layers(path.parent / base, (*above, path)), (given, str(path))]


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, then the YAML file (after the one it includes), then key=value overrides, the last of a key winning.

    Raises Failure naming the file or override and the key.
    """
    config = OmegaConf.structured(Config)
    for given, where in _layers(Path(path)) if path is not None else ():
        config = _merge(config, given, where)
    for override in overrides:
        if "=" not in override:
            raise Failure(f"override '{override}': write key=value, for example train.epochs=10")
        where = f"override '{override}'"
        key, _, value = override.partition("=")
        if not value and key in keys() and isinstance(value_of(Config(), key), str):
            override = f"{key}=''"  # nothing is null in YAML
        try:
            given = OmegaConf.from_dotlist([override])
        except Exception as error:  # the value is YAML too
            raise Failure(f"{where}: not readable as YAML ({str(error).splitlines()[0]})") from error
        config = _merge(config, given, where)
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    _check(result)
    return result


def parse(text: str, where: str) -> Config:
    """The config that ``to_yaml`` wrote, as a checkpoint holds it. Raises Failure naming ``where`` and the key."""
    try:
        given = OmegaConf.create(text)
    except Exception as error:  # whatever the YAML reader raises
        raise Failure(f"{where}: not readable as YAML ({str(error).splitlines()[0]})") from error
    result = OmegaConf.to_object(_merge(OmegaConf.structured(Config), given, where))
    assert isinstance(result, Config)
    _check(result)
    return result


def _check(config: Config) -> None:
    """Ranges, and what cannot be together; what a config alone cannot know is checked where it is used."""
    from .utils import devices, part_weights

    if config.loss.kernel not in KERNELS:
        raise Failure(f"loss.kernel={config.loss.kernel}: unknown; use {' or '.join(KERNELS)}")
    if not config.loss.sigma > 0:
        raise Failure(f"loss.sigma={config.loss.sigma}: must be positive")
    low = {
        "data.horizon": 1,
        "data.edge_drop": 0,
        "data.frames": 0,
        "data.first_frame": 0,
        "data.last_frame": -1,
        "partition.parts": 0,
        "model.hidden": 1,
        "model.layers": 1,
        "model.virtual_nodes": 1,
        "model.basis": 1,
        "model.channels": 1,
        "model.tile": 1,
        "loss.mmd": 0,
        "loss.samples": 1,
        "train.epochs": 1,
        "train.batch_size": 1,
        "train.accumulate": 1,
        "train.replicas": 1,
        "train.lr": 0,
        "train.warmup": 0,
        "train.plateau_epochs": 1,
        "train.weight_decay": 0,
        "train.clip": 0,
        "train.patience": 0,
        "train.timeout_s": 1,
        "train.checkpoint_minutes": 0,
    }
    for key, least in low.items():
        value = value_of(config, key)
        if not value >= least:
            raise Failure(f"{key}={value}: must be at least {least}")
    if config.partition.halo not in HALOS:
        raise Failure(f"partition.halo={config.partition.halo}: unknown; use {' or '.join(HALOS)}")
    if config.partition.weights is not None:
        part_weights.validate(config.partition.weights, config.partition.parts or len(config.partition.weights))
    data, train = config.data, config.train
    if not data.radius > 0:
        raise Failure(f"data.radius={data.radius}: must be positive (.inf for the complete graph)")
    cutoff = config.model.cutoff
    if cutoff is not None and not 0 < cutoff < math.inf:
        raise Failure(f"model.cutoff={cutoff}: must be positive and finite, or null: data.radius")
    if data.edge_drop > 1:
        raise Failure(f"data.edge_drop={data.edge_drop}: must lie in 0 … 1")
    if 0 <= data.last_frame < data.first_frame:
        raise Failure(f"data.last_frame={data.last_frame}: lies before data.first_frame={data.first_frame}")
    if train.replicas > train.accumulate:
        raise Failure(
            f"train.replicas={train.replicas}: groups share the batches of a step, and train.accumulate={train.accumulate} of "
            f"them leave some without any; set train.accumulate={train.replicas}, and a smaller train.batch_size to match"
        )
    if train.schedule not in SCHEDULES:
        raise Failure(f"train.schedule={train.schedule}: unknown; use {', '.join(SCHEDULES[:-1])} or {SCHEDULES[-1]}")
    if not 0 < train.plateau_factor < 1:
        raise Failure(f"train.plateau_factor={train.plateau_factor}: must lie between 0 and 1")
    if train.warmup >= train.epochs:
        raise Failure(f"train.warmup={train.warmup}: must be shorter than train.epochs={train.epochs}")
    if train.schedule == "plateau" and 0 < train.patience <= train.plateau_epochs:
        raise Failure(
            f"train.patience={train.patience}: training would stop before the rate falls, after "
            f"train.plateau_epochs={train.plateau_epochs}; raise the one or lower the other"
        )
    devices.check_name(train.device, "train.device=", "auto")
    if config.model.gravity is not None and len(config.model.gravity) != 3:
        raise Failure(f"model.gravity={config.model.gravity}: must be a vector of 3 numbers, or null")


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def differences(there: Config, wanted: Config, but: Collection[str] = ()) -> list[tuple[str, Any, Any]]:
    """(key, value there, value wanted) of each key, except ``but``, in which two configs differ."""
    pairs = ((key, value_of(there, key), value_of(wanted, key)) for key in keys() if key not in but)
    return [(key, was, now) for key, was, now in pairs if was != now]


def to_yaml(config: Config) -> str:
    """The configuration as YAML, every key with its comment."""
    lines = []
    for section, kind in SECTIONS.items():
        lines.append(f"{section}:  # {(kind.__doc__ or '').splitlines()[0]}")
        part = getattr(config, section)
        for f in fields(part):
            # flow style keeps a list on its line, before the comment
            value = yaml.safe_dump({f.name: getattr(part, f.name)}, default_flow_style=True, width=10**6).strip()[1:-1]
            lines.append(f"  {value}  # {f.metadata['comment']}")
    return "\n".join(lines) + "\n"
