"""FastEGNN weights of the authors' code: renaming, safe reading, and import as a run.

The expected outputs are those of numpy_fast_egnn.py, the paper's formulas, for the same weights.
"""

from __future__ import annotations

import pickle
import re
import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy_fast_egnn
import pytest
import torch
from torch import Tensor

import dist_egnn
from dist_egnn import cli, config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.import_weights import run_import
from dist_egnn.data.graphs import build_graph, radius_edges
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.models import published_weights
from dist_egnn.models.network import FastEGNN
from dist_egnn.train import checkpoint, trainer

H, L, C, F, A, K = 6, 3, 3, 2, 2, 2
GRAVITY = [0.0, -0.1, 0.5]  # -0.1 is not exact in binary: rounding to float32 would show
# networks of a layer: symbol in the paper → published name
NAMES = {
    "phi_e": "edge_mlp",
    "phi_x": "coord_mlp_r",
    "phi_v": "coord_mlp_vel",
    "phi_h": "node_mlp",
    "phi_g": "gravity_mlp",
    "attention": "att_mlp.0",
    "virtual.phi_ev": "edge_mlp_virtual",
    "virtual.phi_xv": "coord_mlp_r_virtual",
    "virtual.phi_z": "coord_mlp_v_virtual",
    "virtual.phi_s": "node_mlp_virtual",
    "virtual.attention_v": "att_mlp_virtual.0",
}


def weights(
    count: int = C,
    node: int = K,
    edge: int = A,
    attention: bool = False,
    gravity: list[float] | None = None,
    first_code: bool = False,
) -> dict[str, Tensor]:
    """Weights of a FastEGNN in float64, by symbol, so large that every part of a layer has an effect.

    first_code: that of the authors' repository FastEGNN, whose φ_h reads all m_ic, an array (H, C), in place of their mean.
    """
    options: dict[str, Any] = {"virtual_nodes": count, "attention": attention, "gravity": gravity}
    options["virtual_messages"] = "concat" if first_code else "mean"
    shapes = {name: p.shape for name, p in FastEGNN(F, node, edge, hidden=H, layers=L, **options).state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    return {k: torch.randn(s, generator=draw, dtype=torch.float64) / s[-1] ** 0.5 for k, s in shapes.items()}


def published(**options: Any) -> dict[str, Tensor]:
    """The same weights as a state dict of the authors' code."""
    state = {}
    for name, value in weights(**options).items():
        if match := re.fullmatch(r"layers\.(\d+)\.(.*?)((\.\d)?\.(weight|bias))", name):
            state[f"gcl_{match[1]}.{NAMES[match[2]]}{match[3]}"] = value
        elif name == "s":
            state["virtual_node_feat"] = value.T[None]
        else:
            state[name.replace("embedding", "embedding_in")] = value
    return state


def expected_outputs(
    graph: Any, normalize: bool = False, tanh: bool = False, gravity: list[float] | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(x^L, z^L) of these weights by the paper's formulas."""
    arrays = {name: value.numpy() for name, value in weights(gravity=gravity, **options).items()}
    src, dst = (end.tolist() for end in graph.edges())
    edges = list(zip(src, dst, graph.edata["e"].double().numpy(), strict=True))
    fields = {name: graph.ndata[name].double().numpy() for name in "xvfa"}
    layout = (lambda m: np.stack(m, 1).ravel()) if options.get("first_code") else None
    on: dict[str, Any] = {"normalize": normalize, "tanh": tanh, "g": gravity, "combine": layout}
    return numpy_fast_egnn.fast_egnn(arrays, L, fields, edges, **on)


def random_graph(edge: int = A, node: int = K) -> Any:
    draw = np.random.default_rng(1)
    x = draw.normal(size=(20, 3))
    nodes = {"x": x, "v": draw.normal(size=(20, 3)), "f": draw.normal(size=(20, F)), "a": draw.normal(size=(20, node))}
    graph = build_graph(*radius_edges(x, 1.2), nodes)
    graph.edata["e"] = torch.from_numpy(draw.normal(size=(graph.num_edges(), edge)))
    return graph


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"attention": True},
    "normalize": {"normalize": True},
    "gravity": {"gravity": GRAVITY},
    "one virtual node": {"count": 1},
    "no node attributes": {"node": 0},
    "no edge attributes": {"edge": 0},
    "all": {"attention": True, "normalize": True, "gravity": GRAVITY, "count": 5, "edge": 1},
    "tanh": {"tanh": True},
    "first code": {"first_code": True, "node": 0},
    "first code, node attributes": {"first_code": True, "normalize": True, "gravity": GRAVITY},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_are_those_of_the_published_weights(options):
    training = {name: options[name] for name in ("normalize", "tanh", "gravity") if name in options}
    state = published(**{name: value for name, value in options.items() if name not in ("normalize", "tanh")})
    graph = random_graph(options.get("edge", A), options.get("node", K))
    expected = expected_outputs(graph, **options)
    centroid = graph.ndata["x"].mean(0).numpy()
    for prefix in ("", "module."):
        model = FastEGNN.from_published({prefix + key: value for key, value in state.items()}, **training)
        with torch.no_grad():
            x, z = (t.numpy() for t in model(graph))
        assert x.dtype == np.float64
        assert z[0].shape == (options.get("count", C), 3)
        assert np.abs(expected[1] - centroid).max() > 0.01
        for result, wanted, start in ((x, expected[0], graph.ndata["x"].numpy()), (z[0], expected[1], centroid)):
            assert np.abs(result - wanted).max() / np.abs(wanted - start).max() < 1e-12


WRONG: list[tuple[str | dict[str, Any], str]] = [  # a prefix of keys to remove, or values to set; the message
    ("gcl_1.node_mlp.2.bias", r"'gcl_1\.node_mlp\.2\.bias' is missing"),
    ("gcl_2.att_mlp_virtual", r"'gcl_2\.att_mlp_virtual\.0\.weight' is missing"),
    ("virtual_node_feat", r"'virtual_node_feat' is missing"),
    ("", r"'embedding_in\.weight' is missing"),
    ("gcl", r"'gcl_0\..*' is missing"),
    ("gcl_1", r"'gcl_1'.* missing.*'gcl_2'"),
    ({"gcl_0.extra": torch.zeros(1)}, r"unknown key 'gcl_0\.extra'"),
    ({"gcl_0.coord_mlp_r.2.bias": torch.zeros(1)}, r"unknown key 'gcl_0\.coord_mlp_r"),
    ({"gcl_2.edge_mlp.2.weight": torch.zeros(7, H)}, r"'gcl_2\.edge_mlp\.2\.weight' .*\(7, 6\).*\(6, 6\)"),
    ({"embedding_in.weight": torch.zeros(64, F)}, r"'gcl_0\.node_mlp\.0\.weight' has 20 columns.*3H = 192"),
    ({"virtual_node_feat": torch.zeros(1, H, 4)}, r"'gcl_0\.edge_mlp_virtual\.0\.weight' .*\(6, 16\).*\(6, 17\)"),
    ({"virtual_node_feat": torch.zeros(H, C)}, r"'virtual_node_feat'.*3 axes"),
    ({"virtual_node_feat": torch.zeros(2, H, C)}, r"'virtual_node_feat' .*\(2, 6, 3\).*\(1, 6, 3\)"),
    ({"epoch": 3}, r"'epoch'.*int"),
    ({"gcl_0.steps": torch.zeros(1, dtype=torch.long)}, r"'gcl_0\.steps'.*int64"),
    ({"module.embedding_in.bias": torch.zeros(H)}, r"'embedding_in\.bias'.*twice"),
    ({"gcl_0.gravity_mlp.0.weight": torch.zeros(H, H)}, r"gravity_mlp.*model\.gravity"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_state_dicts_are_refused_in_one_line(change, message):
    state: dict[str, Any] = published(attention=True)
    if isinstance(change, str):
        state = {key: value for key, value in state.items() if not key.startswith(change)}
    else:
        state |= change
    with pytest.raises(Failure, match=message) as caught:
        FastEGNN.from_published(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("gravity", "message"), [([0, 1, 0], "no gravity_mlp"), ([0, 1], "3 numbers")])
def test_a_wrong_gravity_is_refused(gravity, message):
    with pytest.raises(Failure, match=message):
        FastEGNN.from_published(published(), gravity=gravity)


CONTENTS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "deep": lambda state: {"checkpoint": {"model": {f"module.{k}": v for k, v in state.items()}}, "args": ["a"]},
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_nested_state_dicts_and_both_file_formats_are_read(tmp_path, content, legacy):
    state = published()
    torch.save(content(state), tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    result = published_weights.normalize_keys(published_weights.read_checkpoint(tmp_path / "a.pth")[0])
    assert result.keys() == state.keys()
    assert all(torch.equal(result[key], state[key]) for key in state)


def refused(path: Path, message: str) -> None:
    with pytest.raises(Failure, match=f"{path.name}: .*{message}") as caught:
        published_weights.read_checkpoint(path)
    assert "\n" not in str(caught.value)


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def easydict(monkeypatch):
    """Makes dicts as the package easydict does: they pickle as easydict.EasyDict, with the items also as attributes."""

    class EasyDict(dict):
        def __init__(self, items):
            super().__init__()
            for key, value in items.items():
                self[key] = EasyDict(value) if isinstance(value, dict) else value
            self.__dict__.update(self)

    EasyDict.__module__, EasyDict.__qualname__ = "easydict", "EasyDict"
    module = types.ModuleType("easydict")
    module.EasyDict = EasyDict
    monkeypatch.setitem(sys.modules, "easydict", module)
    return EasyDict


def test_code_in_a_file_is_not_run(tmp_path, easydict):
    """Files as torch and as pickle write them, with code among the weights and alone."""
    state, trace = {**published(), "note": Evil(tmp_path / "ran")}, tmp_path / "ran"
    torch.save(state, tmp_path / "zip.pt")
    torch.save({"config": easydict({"note": Evil(trace)}), **state}, tmp_path / "config.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil(trace)))
    (tmp_path / "system.pt").write_bytes(f"cposix\nsystem\n(S'touch {trace}'\ntR.".encode())
    for path in sorted(tmp_path.glob("*.pt")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refused(path, "damaged, or .*could run code")
        assert not trace.exists(), path
    # the control: the files do run code where that is allowed
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert trace.exists()
    trace.unlink()
    pickle.loads((tmp_path / "system.pt").read_bytes())
    assert trace.exists()


def test_other_and_damaged_files_are_refused(tmp_path, monkeypatch):
    torch.save(published(), tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    (tmp_path / "text.pt").write_text("weights\n")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("readme", "weights")
    torch.save({"loss": 3.0, "w": torch.zeros(2)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": published(), "ema": published()}, tmp_path / "both.pt")
    messages = dict.fromkeys(("half", "text", "other"), "damaged")
    messages |= dict.fromkeys(("foreign", "list"), "'virtual_node_feat'")
    messages |= {"both": "2 state dicts, model and ema", "absent": "no such file"}
    for name, message in messages.items():
        refused(tmp_path / f"{name}.pt", message)
    published_weights.read_checkpoint(tmp_path / "whole.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    refused(tmp_path / "whole.pt", r"torch 2\.9\.1\+cpu.*install torch 2\.10")


def run_import_of(file: Path, folder: Path, *overrides: str) -> None:
    settings = config.load(None, ["data.radius=0.27", "data.horizon=3", f"run.dir={folder}", *overrides])
    run_import(file, published_weights.read_checkpoint(file)[0], settings)


def test_an_imported_run_predicts_as_the_published_weights(tmp_path, small, capsys):
    state = {key: value.float() for key, value in published(node=1).items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    data = [f"data.path={small}", "data.features=[speed,viscosity/max]", "data.node_attributes=[mass]", "data.frames=1"]
    run_import_of(tmp_path / "a.pth", tmp_path / "run", *data)
    assert re.search(rf"^  hidden +{H}$", capsys.readouterr().out, re.M)
    samples = trainer.open_dataset(config.load(tmp_path / "run" / "config.yaml"), 0, 1)
    graphs = [samples[number] for number in samples.splits["test"]]
    errors = [(expected_outputs(graph, node=1)[0] - graph.ndata["y"].numpy()) ** 2 for graph in graphs]
    result = run_evaluation(tmp_path / "run")
    assert result["FastEGNN"] == pytest.approx(float(np.concatenate(errors).mean()), rel=1e-4)
    loaded = dist_egnn.load(tmp_path / "run")
    assert loaded.features == ["speed", "viscosity/max"]
    for number, layer in enumerate(loaded.model.layers):  # those of the last layer have no effect on the outputs
        for key, network in (("node_mlp", layer.phi_h), ("node_mlp_virtual", layer.virtual.phi_s)):
            for name, value in network.state_dict().items():
                assert torch.equal(value, state[f"gcl_{number}.{key}.{name}"])
    with pytest.raises(Failure, match="holds a run already"):
        run_import_of(tmp_path / "a.pth", tmp_path / "run", *data)


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ({"edge": 3}, [], "3 edge attributes"),
        ({"node": 0}, ["data.features=[mass]"], r"data\.features=\[mass\].*a\.pth"),
        ({"node": 2}, [], r"data\.node_attributes=\[\].*2"),
        ({"node": 0, "gravity": GRAVITY}, [], r"a\.pth: .*model\.gravity"),
        ({"node": 0, "attention": True}, ["model.precision=bf16-messages"], r"model\.attention"),
    ],
)
def test_weights_that_do_not_fit_the_config_make_no_run(tmp_path, options, overrides, message):
    torch.save(published(**options), tmp_path / "a.pth")
    with pytest.raises(Failure, match=message):
        run_import_of(tmp_path / "a.pth", tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `distegnn import-checkpoint`; the exit code and what it prints as an error."""

    def run(*words: object) -> tuple[Any, str]:
        monkeypatch.setattr("sys.argv", ["distegnn", "import-checkpoint", *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


# the parts of the authors' configs that an import reads, by data set, and our keys that must follow from them
TRAINED = {
    "nbody_100": (
        {"radius": -1, "cutoff_rate": 0.75, "frame_0": 30, "frame_T": 40},
        {"radius": float("inf"), "edge_drop": 0.75, "first_frame": 30, "last_frame": 30, "horizon": 10},
        ["speed", "charge/max"],
    ),
    "protein": (
        {"radius": 10, "cutoff_rate": 0.0, "delta_t": 15},
        {"radius": 10.0, "horizon": 15},
        ["speed", "charge/max"],
    ),
    "Water-3D": (
        {"inner_radius": 0.035, "outer_radius": 0.015, "delta_t": 20},
        {"radius": 0.035, "horizon": 20, "frames": 15, "last_frame": 250},
        ["speed", "type/max"],
    ),
    "Fluid113K": (
        {"inner_radius": 0.075, "outer_radius": 0.05, "delta_t": 20},
        {"radius": 0.075, "horizon": 20, "frames": 16, "last_frame": 50, "node_attributes": ["viscosity", "mass"]},
        ["viscosity", "mass", "speed"],
    ),
}


def trained_with(dataset: str, name: str = "FastEGNN") -> dict[str, Any]:
    train = {"learning_rate": 5e-4, "weight_decay": 1e-12, "epochs": 2500, "early_stop": 100, "accumulation_steps": 4}
    return {
        "model": {"model_name": name, "normalize": True, "hidden_nf": H, "virtual_channels": C},
        "data": {"dataset_name": dataset, "batch_size": 250, "world_size": 1, **TRAINED[dataset][0]},
        "train": {**train, "mmd": {"sigma": 3, "weight": 0.02, "samples": 50}, "device": "cuda:3"},
        "log": {"wandb": {"api_key": "secret"}},
        "seed": 43,
    }


def trainer_file(path: Path, config: Any, prefix: str = "", **options: Any) -> dict[str, Tensor]:
    """Write what the trainer of the authors' DistEGNN writes; returns the state dict."""
    state = {f"{prefix}{key}": value for key, value in published(**options).items()}
    optimizer = torch.optim.Adam([torch.nn.Parameter(value) for value in state.values()])
    content = {"epoch": 8, "model_state_dict": state, "optimizer_state_dict": optimizer.state_dict()}
    losses = {"loss_train": 0.1, "loss_valid": 0.2, "loss_test": 0.3}
    torch.save({**content, "scheduler_state_dict": None, **losses, "config": config}, path)
    return state


@pytest.mark.parametrize("dataset", TRAINED)
def test_a_file_of_the_trainer_needs_no_config(tmp_path, monkeypatch, easydict, command, dataset):
    prefix, width = ("module.", 3) if dataset == "Fluid113K" else ("", 2)
    monkeypatch.setattr(sys.modules[__name__], "F", width)
    node = 2 if dataset == "Fluid113K" else 0
    trainer_file(tmp_path / "best_model.pth", easydict(trained_with(dataset)), prefix, node=node)
    monkeypatch.delitem(sys.modules, "easydict")
    assert command(tmp_path / "best_model.pth", "--out", tmp_path / "run") == (0, "")
    made = config.load(tmp_path / "run" / "config.yaml")
    assert {key: getattr(made.data, key) for key in TRAINED[dataset][1]} == TRAINED[dataset][1]
    assert made.data.features == TRAINED[dataset][2]
    assert (made.data.velocity, made.data.velocity_scale) == ("forward", 1.0)
    assert (made.loss.mmd, made.loss.sigma, made.loss.samples) == (0.02, 3.0, 50)
    t = made.train
    assert (t.lr, t.weight_decay, t.epochs, t.patience, t.accumulate) == (5e-4, 1e-12, 2500, 100, 4)
    assert (t.batch_size, t.seed) == (250, 43)
    graph = random_graph(node=node)
    model, best = trainer.build_model(made, (width, node), SingleProcess()).double(), tmp_path / "run" / "best.pt"
    checkpoint.load_weights(model, checkpoint.load(best), best)
    expected = expected_outputs(graph, normalize=True, node=node)
    with torch.no_grad():
        x, z = (t.numpy() for t in model(graph))
    for result, wanted in ((x, expected[0]), (z[0], expected[1])):
        assert np.abs(result - wanted).max() < 1e-10 * np.abs(wanted).max()


def test_overrides_win_over_a_file_and_a_file_over_a_config(tmp_path, easydict, command):
    trainer_file(tmp_path / "a.pth", easydict(trained_with("protein")), node=0)
    (tmp_path / "mine.yaml").write_text("data: {path: mine.h5, horizon: 3}\nmodel: {normalize: false}\n")
    options = ["--config", tmp_path / "mine.yaml", "--radius", 7, "train.epochs=9"]
    assert command(tmp_path / "a.pth", "--out", tmp_path / "run", *options) == (0, "")
    made = config.load(tmp_path / "run" / "config.yaml")
    assert (made.data.horizon, made.model.normalize, made.data.radius, made.train.epochs) == (15, True, 7.0, 9)
    assert made.data.path.endswith("mine.h5")
    assert "secret" not in (tmp_path / "run" / "config.yaml").read_text()


def test_other_models_of_the_trainer_are_refused(tmp_path, easydict, command):
    trainer_file(tmp_path / "a.pth", easydict(trained_with("protein", "FastSchNet")), node=0)
    code, errors = command(tmp_path / "a.pth", "--out", tmp_path / "run")
    assert (code, errors.count("\n")) == (2, 1)
    assert "a.pth: holds a FastSchNet" in errors


def test_command(tmp_path, command):
    state, file, out = published(node=0, gravity=GRAVITY), tmp_path / "a.pth", tmp_path / "run"
    torch.save(state, file)
    code, errors = command(file, "--radius", 1)
    assert (code, errors.count("\n")) == (2, 1)
    assert "--out" in errors
    assert command(file, "--out", out)[0] == 2
    assert "model.gravity" in command(file, "--out", out, "--radius", 1)[1]
    keys = ("model.normalize=true", "model.gravity=[-1,-9.81,0.5]", "data.features=[charge/max, speed]")
    keys += ("data.horizon=7", "data.edge_drop=0.5")
    assert command(file, "--out", out, "--radius", 2, *keys) == (0, "")
    made = config.load(out / "config.yaml")
    assert (made.data.radius, made.data.horizon, made.data.edge_drop) == (2, 7, 0.5)
    assert made.data.features == ["charge/max", "speed"]
    m = made.model
    assert (m.name, m.hidden, m.layers, m.virtual_nodes) == ("FastEGNN", H, L, C)
    assert (m.normalize, m.attention, m.gravity) == (True, False, [-1.0, -9.81, 0.5])
    model = trainer.build_model(made, (F, 0), SingleProcess())
    assert sum(p.numel() for p in model.parameters()) == sum(value.numel() for value in state.values())
