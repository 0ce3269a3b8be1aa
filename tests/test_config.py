"""The configuration: a round trip through YAML, the order of precedence, and errors that name the file and the key."""

from __future__ import annotations

import ast
import inspect
import math
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from dist_egnn.config import SECTIONS, Config, keys, load, to_yaml
from dist_egnn.errors import Failure
from dist_egnn.models import network

ROOT = Path(__file__).parents[1]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return path


def message_of(path: Path | None, overrides: list[str] = [], match: str = "") -> str:  # noqa: B006 (not changed)
    """The one-line error of loading a config, which matches ``match``."""
    with pytest.raises(Failure, match=match) as caught:
        load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trips(tmp_path: Path) -> None:
    assert load(None) == load(write(tmp_path, "")) == load(write(tmp_path, to_yaml(Config()))) == Config()
    overrides = ["data.path=a b.h5", "data.radius=0.075", "data.features=[mass,charge/max]", "data.node_attributes=[]"]
    overrides += ["model.gravity=[0,0,-9.81]", "model.tanh=true", "train.lr=1.0e-3", "run.dir='runs/ # 1: x'"]
    config = load(None, overrides)
    for key, _, text in (override.partition("=") for override in overrides):
        assert attrgetter(key)(config) == (text if key == "data.path" else yaml.safe_load(text))
    assert load(write(tmp_path, to_yaml(config))) == config


def test_yaml_has_a_comment_on_every_key() -> None:
    lines = to_yaml(Config()).splitlines()
    assert len(lines) == len(keys()) + len(SECTIONS)
    assert len(set(keys())) == len(keys())
    assert all(len(line.split("  # ")[1].strip()) > 3 for line in lines)
    assert list(yaml.safe_load("\n".join(lines))) == list(SECTIONS)


def test_overrides_take_precedence_over_the_file_and_later_over_earlier(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {epochs: 7, lr: 0.1, kept: /tmp}\ndata: {radius: .inf}\nmodel: {cutoff: 2.0}\n")
    config = load(path, ["train.epochs=8", "train.epochs=9", "run.dir=elsewhere"])
    assert (config.train.epochs, config.train.lr, config.run.dir) == (9, 0.1, "elsewhere")
    assert (config.data.radius, config.train.batch_size) == (math.inf, Config().train.batch_size)
    empty = load(path, ["train.kept=", "model.cutoff="])  # an empty string if the key is a string, else null
    assert (empty.train.kept, empty.model.cutoff) == ("", None)


HOME = str(Path.home())
TYPED = [("train.seed", "010", 10), ("data.horizon", "008", 8), ("run.dir", "0712", "0712"), ("run.dir", "1e3", "1e3")]
TYPED += [("run.dir", "12:30:45", "12:30:45"), ("run.dir", "~/x", f"{HOME}/x"), ("run.dir", "off", "off")]
TYPED += [("data.features", "[on, 1e3, 'a b']", ["on", "1e3", "a b"]), ("model.cutoff", "null", None)]
TYPED += [
    ("model.tanh", "True", True),
    ("data.radius", "-.INF", None),
    ("model.gravity", "[0, 1e1, -1]", [0.0, 10, -1]),
]
TYPED += [("train.lr", number, 0.1) for number in ("0.1", "1e-1", "1.0e-1")]
TYPED += [(key, word, None) for key, word in (("train.epochs", "1:30"), ("train.epochs", "1_0"), ("model.tanh", "on"))]
TYPED += [("model.tanh", "1", None), ("run.dir", "~", None), ("run.dir", "null", None), ("train.lr", "1:30", None)]


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(("key", "text", "value"), TYPED)
def test_values_are_read_by_the_type_of_their_key(tmp_path, in_file, key, text, value):
    """Not by YAML's guess; a value of None is refused, unless the key has null."""
    section, name = key.split(".")
    given = write(tmp_path, f"{section}:\n  {name}: {text}\n") if in_file else None
    overrides = [] if in_file else [f"{key}={text}"]
    if (value is None and text != "null") or (key == "run.dir" and text == "null"):
        message_of(given, overrides, match=rf"{key}=")
    else:
        result = attrgetter(key)(load(given, overrides))
        assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*/config.yaml")), ids=lambda path: path.parent.name)
def test_recipes_load(path: Path) -> None:
    config = load(path)
    assert config.data.path.startswith(("recipes/", "data/"))
    for section, entries in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        for name, value in entries.items():
            assert attrgetter(f"{section}.{name}")(config) == value


MISTAKES = [
    ("train: {epoch: 3}", r"'train\.epoch'.* train\.epochs"),
    ("trian: {epochs: 3}", "'trian'"),
    ("epochs: 3", r"'epochs'.* train\.epochs"),
    ("zzz: {qqq: 1}", "'zzz'.*`distegnn config`"),
    ("data: {raduis: 1}", r"data\.radius"),
    ("train: 3", "'train' is a section"),
    ("train:", "'train' is a section"),
    ("- 1", "`distegnn config`"),
    ("train: {epochs: many}", r"train\.epochs=many: must be a whole number"),
    ("train: {epochs: 1.5}", r"train\.epochs=1\.5"),
    ("train: {epochs: null}", r"train\.epochs=null: must be a whole number"),
    ("data: {features: mass}", r"data\.features=mass: must be a list"),
    ("data: {features: {mass: 1}}", r"data\.features="),
    ("model: {gravity: [0, 0, down]}", r"model\.gravity="),
    ("model: {tanh: perhaps}", r"model\.tanh=perhaps: must be true or false"),
    ("data: {path: '${nowhere}'}", r"data\.path=.*nowhere"),
    ("train: {epochs: 3", "YAML"),
    ("train: {epochs: 3}\ntrain: {lr: 1}", "YAML"),
    ("a: \x00", "YAML"),
    ("include: my.yaml", r"include: .*/my\.yaml"),
    ("include: [a.yaml, b.yaml]", r"include: .*\['a"),
    ("include:", "include: "),
    ("include: ok.yaml\ntrain: {epoch: 3}", r"'train\.epoch'"),
    ("include: absent.yaml", r"/absent\.yaml: .*/my\.yaml"),
    ("include: other.yaml", r"/other\.yaml: include: .*my\.yaml"),
    ("include: wrong.yaml", r"/wrong\.yaml: .*'train\.epoch'"),
]


@pytest.mark.parametrize(("text", "match"), MISTAKES)
def test_errors_in_a_file_and_its_includes(tmp_path: Path, text: str, match: str) -> None:
    files = {"other": "include: ./my.yaml", "wrong": "train: {epoch: 3}", "ok": "train: {epochs: 3}"}
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    message_of(write(tmp_path, text), match=f"^{tmp_path}{match if match[0] == '/' else '/my.yaml: .*' + match}")


def test_paths_that_are_not_config_files(tmp_path: Path) -> None:
    for name in ("store/manifest.yaml", "run/config.yaml", "folder/x"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    remedies = {"store": r"data\.path=.*store$", "some.h5": r"data\.path=.*some\.h5$", "run": r"run/config\.yaml$"}
    remedies |= dict.fromkeys(("folder", "absent.yaml"), "`distegnn config > my.yaml`") | {"binary.yaml": "YAML"}
    for name, match in remedies.items():
        assert message_of(tmp_path / name, match=match).startswith(f"{tmp_path / name}: ")


OVERRIDES = {"train.epoch=3": r"'train\.epoch'.* train\.epochs", "train.epochs": "key=value", "=3": "override '=3'"}
OVERRIDES |= {"train=3": "'train' is a section", "train.epochs=": r"train\.epochs=", "data.features=[mass": "YAML"}
OVERRIDES |= {
    "train.epochs.x=3": r"'train\.epochs\.x'.* train\.epochs",
    "data.path=${nowhere}": r"data\.path=.*nowhere",
}


def test_errors_in_an_override() -> None:
    for override, match in OVERRIDES.items():
        assert message_of(None, [override], match).startswith(f"override '{override}'")


MINIMUM = {"data.last_frame": -1, "data.frames": 0, "data.first_frame": 0, "partition.parts": 0, "loss.mmd": 0}
MINIMUM |= {f"train.{name}": 0 for name in ("lr", "warmup", "weight_decay", "clip", "patience", "checkpoint_minutes")}
MINIMUM |= {f"train.{name}": 1 for name in ("epochs", "batch_size", "accumulate", "replicas", "plateau_epochs")}
MINIMUM |= {f"model.{name}": 1 for name in ("hidden", "layers", "virtual_nodes", "basis", "channels", "tile")}
MINIMUM |= {"data.horizon": 1, "loss.samples": 1, "train.timeout_s": 1}


WRONG = {"data.edge_drop": "-0.1 1.5 .nan", "data.radius": "0 -1 .nan", "loss.kernel": "cosine", "loss.sigma": "0"}
WRONG |= {"model.gravity": "[1,2]", "partition.halo": "none", "train.lr": ".nan", "train.schedule": "linear"}
WRONG |= {
    "train.backend": "mpi NCCL",
    "train.device": "gpu Cuda cuda:x cuda:-1 cuda:01 cuda:N cpu:0 1",
    "train.plateau_factor": "0 1 .nan",
}
CONTRADICTIONS = [
    ("data.first_frame=5", "data.last_frame=4", r"data\.last_frame=4: .* data\.first_frame=5"),
    ("train.epochs=3", "train.warmup=3", r"train\.warmup=3\.0: .* train\.epochs=3"),
    ("train.accumulate=2", "train.replicas=3", r"train\.replicas=3: .* train\.accumulate=3 .*train\.batch_size"),
    ("train.schedule=plateau", "train.patience=10", r"train\.patience=10: .* train\.plateau_epochs=10"),
]


def test_values_out_of_range_and_contradictions() -> None:
    for key, least in MINIMUM.items():
        assert attrgetter(key)(load(None, [f"{key}={least}"])) == least
        message_of(None, [f"{key}=-2"], rf"^{key}=-2(.0)?: .*{least}$")
    for key, values in WRONG.items():
        for value in values.split():
            message_of(None, [f"{key}={value}"], f"^{key}=")
    for first, second, match in CONTRADICTIONS:
        load(None, [first])
        message_of(None, [first, second], f"^{match}")


def test_an_including_file_takes_precedence(tmp_path: Path) -> None:
    """Includes are relative to the file that names them; their keys are merged one by one."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "root.yaml").write_text("train: {lr: 0.1, epochs: 7, seed: 3}\n")
    (tmp_path / "base" / "more.yaml").write_text("include: root.yaml\ntrain: {lr: 0.2}\nmodel: {hidden: 8}\n")
    config = load(write(tmp_path, "include: base/more.yaml\ntrain: {epochs: 9}\n"), ["train.seed=4"])
    assert (config.train.lr, config.train.epochs, config.train.seed, config.model.hidden) == (0.2, 9, 4, 8)
    assert "include" not in to_yaml(config)


def test_every_key_is_read() -> None:
    """In the package: as an attribute of its section (`settings` or `d`), or as an option of a model."""
    options = set(inspect.signature(network.EGNN).parameters)
    for model in network.MODELS.values():
        if issubclass(model, network.Network):
            options |= set(inspect.signature(model.layer.build).parameters)
    read = {f"model.{name}" for name in options}
    for file in [*(ROOT / "dist_egnn").rglob("*.py"), *(ROOT / "partition").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and file.name != "config.py":
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                read |= {f"{s}.{node.attr}" for s in (SECTIONS if owner in ("settings", "d") else [owner])}
    assert [key for key in [*keys(), "train.absent"] if key not in read] == ["train.absent"]
