"""The configuration: what is written loads again, and every mistake is named with its file, its key and the nearest one."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from pathlib import Path

import pytest
import yaml

from dist_egnn.config import SECTIONS, Config, keys, load, to_yaml
from dist_egnn.errors import Failure
from dist_egnn.models import network

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/*/config.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return path


def test_defaults_round_trip(tmp_path):
    assert load(None) == Config()
    assert load(write(tmp_path, to_yaml(Config()))) == Config()
    assert load(write(tmp_path, "")) == Config()


def test_every_value_round_trips(tmp_path):
    config = load(
        None,
        [
            "data.path=a b.h5",
            "data.radius=0.075",
            "data.features=[mass,charge/max]",
            "data.node_attributes=[]",
            "model.gravity=[0,0,-9.81]",
            "model.tanh=true",
            "train.lr=1e-3",
            "run.dir='runs/ # 1: x'",
        ],
    )
    assert (config.data.path, config.data.radius, config.data.features) == ("a b.h5", 0.075, ["mass", "charge/max"])
    assert (config.model.gravity, config.model.tanh, config.train.lr) == ([0.0, 0.0, -9.81], True, 1e-3)
    assert load(write(tmp_path, to_yaml(config))) == config


def test_every_key_has_its_comment():
    lines = to_yaml(Config()).splitlines()
    assert len(lines) == len(keys()) + len(SECTIONS)
    for line in lines:
        _, comment = line.split("  # ")
        assert len(comment.strip()) > 3
    assert [f"{name}" for name in yaml.safe_load("\n".join(lines))] == list(SECTIONS)


def test_overrides_win_over_the_file_and_later_over_earlier(tmp_path):
    path = write(tmp_path, "train: {epochs: 7, lr: 0.1}\ndata: {radius: .inf}\n")
    config = load(path, ["train.epochs=8", "train.epochs=9", "run.dir=elsewhere"])
    assert (config.train.epochs, config.train.lr, config.run.dir) == (9, 0.1, "elsewhere")
    assert config.data.radius == math.inf
    assert config.train.batch_size == Config().train.batch_size


def test_an_empty_override_is_an_empty_string_where_strings_are(tmp_path):
    path = write(tmp_path, "train: {kept: /tmp}\nmodel: {cutoff: 2.0}\n")
    found = load(path, ["train.kept=", "model.cutoff="])
    assert (found.train.kept, found.model.cutoff) == ("", None)


@pytest.mark.parametrize("value", ["0.1", "1e-1", "1.0e-1"])
def test_numbers_as_people_write_them(tmp_path, value):
    assert load(None, [f"train.lr={value}"]).train.lr == 0.1
    assert load(write(tmp_path, f"train: {{lr: {value}}}")).train.lr == 0.1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_recipes_load(path):
    config = load(path)
    assert config.data.path.startswith(("recipes/", "data/"))
    given = yaml.safe_load(path.read_text())
    for section, entries in given.items():
        for name, value in entries.items():
            assert getattr(getattr(config, section), name) == value


def test_fluid_recipe_is_there():
    assert "fluid113k" in [path.parent.name for path in RECIPES]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {epoch: 3}", r"unknown key 'train\.epoch'; did you mean train\.epochs\?"),
        ("trian: {epochs: 3}", "unknown key 'trian'"),
        ("epochs: 3", r"unknown key 'epochs'; did you mean train\.epochs\?"),
        ("zzz: {qqq: 1}", "unknown key 'zzz'; see `distegnn config` for all keys"),
        ("data: {raduis: 1}", r"did you mean data\.radius\?"),
        ("train: 3", "'train' is a section"),
        ("train:", "'train' is a section"),
        ("- 1", "a config is a mapping of sections"),
        ("train: {epochs: many}", r"train\.epochs='many'"),
        ("train: {epochs: 1.5}", r"train\.epochs=1\.5"),
        ("train: {epochs: null}", r"train\.epochs=None"),
        ("data: {features: mass}", r"data\.features='mass'"),
        ("data: {features: {mass: 1}}", r"data\.features="),
        ("model: {gravity: [0, 0, down]}", r"model\.gravity="),
        ("model: {tanh: perhaps}", r"model\.tanh='perhaps'"),
        ("data: {path: '${nowhere}'}", "nowhere"),
        ("train: {epochs: 3", "not readable as YAML"),
        ("train: {epochs: 3}\ntrain: {lr: 1}", "not readable as YAML"),
        ("a: \x00", "not readable as YAML"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(Failure, match=says) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_config_is_named(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "store" / "manifest.yaml").touch()
    (tmp_path / "run" / "config.yaml").touch()
    for name in ("store", "some.h5"):
        with pytest.raises(
            Failure, match=rf"{name}: data, not a config; name a config first, and then data\.path=.*{name}$"
        ):
            load(tmp_path / name)
    with pytest.raises(Failure, match=r"run: the folder of a run, not a config; its config is .*run/config\.yaml$"):
        load(tmp_path / "run")


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(Failure, match=r"absent\.yaml: no such config file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(Failure, match="no such config file"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(Failure, match=r"binary\.yaml: not readable as YAML"):
        load(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.epoch=3", r"unknown key 'train\.epoch'; did you mean train\.epochs\?"),
        ("epochs=3", r"unknown key 'epochs'; did you mean train\.epochs\?"),
        ("train.epochs", "write key=value"),
        ("train=3", "'train' is a section"),
        ("train.epochs=", r"train\.epochs="),
        ("train.epochs=many", r"train\.epochs='many'"),
        ("train.epochs.x=3", r"train\.epochs="),
        ("=3", "override '=3'"),
        ("data.features=mass", r"data\.features='mass'"),
        ("data.features=[mass", r"override 'data\.features=\[mass'"),
        ("data.path=${nowhere}", "nowhere"),
    ],
)
def test_mistakes_in_an_override(override, says):
    with pytest.raises(Failure, match=says) as caught:
        load(None, [override])
    assert str(caught.value).startswith(f"override '{override}'")
    assert "\n" not in str(caught.value)


LOWEST = {
    "data.horizon": 1,
    "data.edge_drop": 0,
    "data.frames": 0,
    "data.first_frame": 0,
    "data.last_frame": -1,
    "partition.parts": 0,
    "model.hidden": 1,
    "model.layers": 1,
    "model.virtual_nodes": 1,
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


@pytest.mark.parametrize("key", LOWEST)
def test_ranges(key):
    section, name = key.split(".")
    assert getattr(getattr(load(None, [f"{key}={LOWEST[key]}"]), section), name) == LOWEST[key]
    with pytest.raises(Failure, match=f"{key}=-2(.0)?: must be at least {LOWEST[key]}"):
        load(None, [f"{key}=-2"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.edge_drop=1.5", r"data\.edge_drop=1\.5: must lie in"),
        ("data.edge_drop=.nan", r"data\.edge_drop=nan"),
        ("data.radius=0", r"data\.radius=0"),
        ("data.radius=-1", r"data\.radius=-1"),
        ("data.radius=.nan", r"data\.radius=nan"),
        ("train.lr=.nan", r"train\.lr=nan"),
        ("train.schedule=linear", r"train\.schedule=linear: unknown; use constant, cosine or plateau"),
        *(
            (f"train.device={name}", rf"train\.device={name}: unknown; use cpu, cuda, cuda:N or auto$")
            for name in ("gpu", "Cuda", "cuda:x", "cuda:-1", "cuda:01", "cuda:N", "cpu:0", "1")
        ),
        ("train.warmup=100", r"train\.warmup=100\.0: must be shorter than train\.epochs=100"),
        *((f"train.plateau_factor={x}", r"train\.plateau_factor=.*: must lie between 0 and 1") for x in (0, 1, ".nan")),
        ("model.gravity=[1,2]", r"model\.gravity=\[1\.0, 2\.0\]: must be a vector of 3"),
        ("loss.kernel=cosine", "kernel"),
        ("loss.sigma=0", "sigma"),
    ],
)
def test_values_out_of_range(override, says):
    with pytest.raises(Failure, match=says):
        load(None, [override])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.first_frame=5", "data.last_frame=4"], r"data\.last_frame=4: lies before data\.first_frame=5"),
        (["train.epochs=3", "train.warmup=3"], r"train\.warmup=3\.0: must be shorter than train\.epochs=3"),
        (
            ["train.accumulate=2", "train.replicas=3"],
            r"train\.replicas=3: .* train\.accumulate=2 .* set train\.accumulate=3, .* train\.batch_size",
        ),
        (
            ["train.schedule=plateau", "train.patience=10"],
            r"train\.patience=10: training would stop before the rate falls, after train\.plateau_epochs=10",
        ),
    ],
)
def test_what_cannot_be_together(overrides, says):
    for k in range(len(overrides)):
        load(None, overrides[:k])
    with pytest.raises(Failure, match=says):
        load(None, overrides)


def test_an_included_file_comes_first(tmp_path):
    """Relative to the file that includes it; what that sets wins, key by key; overrides win over both."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "root.yaml").write_text("train: {lr: 0.1, epochs: 7, seed: 3}\n")
    (tmp_path / "base" / "more.yaml").write_text("include: root.yaml\ntrain: {lr: 0.2}\nmodel: {hidden: 8}\n")
    path = write(tmp_path, "include: base/more.yaml\ntrain: {epochs: 9}\n")
    config = load(path, ["train.seed=4"])
    assert (config.train.lr, config.train.epochs, config.train.seed, config.model.hidden) == (0.2, 9, 4, 8)
    assert "include" not in to_yaml(config)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("include: absent.yaml", r"/absent\.yaml: no such config file \(include of .*/my\.yaml\)"),
        ("include: my.yaml", r"/my\.yaml: include: .*/my\.yaml: the files include each other in a circle"),
        ("include: other.yaml", r"/other\.yaml: include: .*my\.yaml: the files include each other in a circle"),
        ("include: [a.yaml, b.yaml]", r"/my\.yaml: include: must name one config file, .*, not \['a"),
        ("include:", r"/my\.yaml: include: must name one config file"),
        ("include: wrong.yaml", r"/wrong\.yaml: unknown key 'train\.epoch'; did you mean train\.epochs\?"),
        ("include: ok.yaml\ntrain: {epoch: 3}", r"/my\.yaml: unknown key 'train\.epoch'; did you mean train\.epochs\?"),
    ],
)
def test_mistakes_in_an_include(tmp_path, text, says):
    (tmp_path / "other.yaml").write_text("include: ./my.yaml")
    (tmp_path / "wrong.yaml").write_text("train: {epoch: 3}")
    (tmp_path / "ok.yaml").write_text("train: {epochs: 3}")
    with pytest.raises(Failure, match=says) as caught:
        load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


ALIASES = {"data": ("data", "d")}  # names of a section in the code, beside its own and `settings`


def test_every_key_is_read():
    """Outside config.py: as section.key, by a known name of the section, or as an option of a model."""
    options = set(inspect.signature(network.EGNN).parameters)
    for model in network.MODELS.values():
        if issubclass(model, network.Network):
            options |= set(inspect.signature(model.layer.build).parameters)
    package = ROOT / "dist_egnn"
    files = [f for f in [*package.rglob("*.py"), *(ROOT / "partition").glob("*.py")] if f.name != "config.py"]
    read = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                of = node.value
                name = of.attr if isinstance(of, ast.Attribute) else of.id if isinstance(of, ast.Name) else ""
                read |= {f"{s}.{node.attr}" for s in SECTIONS if name in (s, "settings", *ALIASES.get(s, ()))}
    read |= {f"model.{name}" for name in options}
    assert [key for key in [*keys(), "train.absent", "model.absent"] if key not in read] == [
        "train.absent",
        "model.absent",
    ]


def test_sections_are_dataclasses_with_defaults():
    assert all(dataclasses.is_dataclass(kind) and kind() for kind in SECTIONS.values())
    assert len(set(keys())) == len(keys())
    assert {"data.path", "train.epochs", "run.dir"} <= set(keys())  # scripts rely on them
