"""FastEGNN weights of the authors' code: renamed, read safely, made into a run.

``Theirs`` is the paper's mathematics once more, in modules that carry the names of the published state dicts.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dist_egnn
from dist_egnn import cli, config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.import_weights import run_import
from dist_egnn.data.graphs import build_graph, radius_edges
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.models import published_weights
from dist_egnn.models.network import FastEGNN
from dist_egnn.train import trainer

H, L, C, F, A, K = 6, 3, 3, 2, 2, 2
GRAVITY = [0.0, -0.1, 0.5]  # -0.1 has no end in binary: rounding it to float32 would show


def two(inputs: int, outputs: int, bias: bool = True, hidden: int = H) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs, bias=bias))


class TheirLayer(nn.Module):
    """One layer, of whatever options; ``virtual``: positions (3, C) and features (H, C), an axis order of their own."""

    def __init__(self, count: int, node: int, edge: int, attention: bool, gravity: bool) -> None:
        super().__init__()
        self.edge_mlp = nn.Sequential(*two(2 * H + 1 + edge, H), nn.SiLU())
        self.edge_mlp_virtual = nn.Sequential(*two(2 * H + 1 + count, H), nn.SiLU())
        self.coord_mlp_r = two(H, 1, bias=False)
        self.coord_mlp_r_virtual = two(H, 1, bias=False)
        self.coord_mlp_v_virtual = two(H, 1, bias=False)
        self.coord_mlp_vel = two(H, 1)
        self.node_mlp = two(3 * H + node, H)
        self.node_mlp_virtual = two(2 * H, H)
        if gravity:
            self.gravity_mlp = two(H, 1)
        if attention:
            self.att_mlp = nn.Sequential(nn.Linear(H, 1), nn.Sigmoid())
            self.att_mlp_virtual = nn.Sequential(nn.Linear(H, 1), nn.Sigmoid())

    def forward(self, h, x, v, a, src, dst, e, s, z, normalize, g):
        n, count = len(x), z.shape[1]
        apart = x[dst] - x[src]
        length = apart.norm(dim=1, keepdim=True)
        m = self.edge_mlp(torch.cat([h[dst], h[src], length**2, e], 1))
        mean_z = z - x.mean(0)[:, None]
        gram = mean_z.T @ mean_z
        said = [
            torch.cat([h, s[:, c].expand(n, -1), (z[:, c] - x).norm(dim=1, keepdim=True), gram[:, c].expand(n, -1)], 1)
            for c in range(count)
        ]
        virtual = [self.edge_mlp_virtual(row) for row in said]
        if hasattr(self, "att_mlp"):
            m = m * self.att_mlp(m)
            virtual = [mc * self.att_mlp_virtual(mc) for mc in virtual]
        mean = torch.zeros(n, n, dtype=x.dtype).index_put((dst, src), torch.ones(len(src), dtype=x.dtype))
        degree = mean.sum(1, keepdim=True).clamp(min=1)

        def gathered(value: Tensor) -> Tensor:
            return torch.zeros(n, value.shape[1], dtype=x.dtype).index_add(0, dst, value) / degree

        direction = apart / (length + 1e-8) if normalize else apart
        moved = x + gathered(direction * self.coord_mlp_r(m)) + self.coord_mlp_vel(h) * v
        for c, mc in enumerate(virtual):
            moved = moved + (x - z[:, c]) * self.coord_mlp_r_virtual(mc) / count
        if hasattr(self, "gravity_mlp"):
            moved = moved + self.gravity_mlp(h) * g
        z_new = [z[:, c] + ((z[:, c] - x) * self.coord_mlp_v_virtual(mc)).mean(0) for c, mc in enumerate(virtual)]
        s_new = [s[:, c] + self.node_mlp_virtual(torch.cat([s[:, c], mc.mean(0)])) for c, mc in enumerate(virtual)]
        mean_virtual = torch.stack(virtual).mean(0)
        h = h + self.node_mlp(torch.cat([h, gathered(m), mean_virtual, a], 1))
        return h, moved, torch.stack(s_new, 1), torch.stack(z_new, 1)


class Theirs(nn.Module):
    def __init__(self, count: int = C, node: int = K, edge: int = A, attention: bool = False, gravity: bool = False):
        super().__init__()
        self.virtual_node_feat = nn.Parameter(torch.randn(1, H, count))
        self.embedding_in = nn.Linear(F, H)
        for k in range(L):
            self.add_module(f"gcl_{k}", TheirLayer(count, node, edge, attention, gravity))

    def forward(self, graph: Any, normalize: bool = False, g: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, v, f, a = (graph.ndata[name] for name in ("x", "v", "f", "a"))
        src, dst = (end.long() for end in graph.edges())
        s, h = self.virtual_node_feat[0], self.embedding_in(f)
        z = x.mean(0)[:, None].expand(-1, s.shape[1])
        for k in range(L):
            h, x, s, z = getattr(self, f"gcl_{k}")(h, x, v, a, src, dst, graph.edata["e"], s, z, normalize, g)
        return x, z.T


def theirs(seed: int = 0, **options: Any) -> Theirs:
    """Their model in float64, its weights drawn so large that all parts of a layer show."""
    torch.manual_seed(seed)
    model = Theirs(**options).double()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) / value.shape[-1] ** 0.5)
    return model


def a_graph(edge: int = A, node: int = K, seed: int = 1) -> Any:
    draw = np.random.default_rng(seed)
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
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_outputs_are_theirs(options, prefix):
    options = dict(options)
    normalize, gravity = options.pop("normalize", False), options.pop("gravity", None)
    model = theirs(gravity=gravity is not None, **options)
    graph = a_graph(options.get("edge", A), options.get("node", K))
    state = {prefix + key: value for key, value in model.state_dict().items()}
    ours = FastEGNN.from_published(state, normalize=normalize, gravity=gravity)
    with torch.no_grad():
        x, z = model(graph, normalize, None if gravity is None else torch.tensor(gravity, dtype=torch.float64))
        found_x, found_z = ours(graph)
    assert float((z - graph.ndata["x"].mean(0)).abs().max()) > 0.01
    assert found_x.dtype == torch.float64
    assert found_z[0].shape == z.shape == (options.get("count", C), 3)
    for found, wanted, start in ((found_x, x, graph.ndata["x"]), (found_z[0], z, graph.ndata["x"].mean(0))):
        assert float((found - wanted).abs().max() / (wanted - start).abs().max()) < 1e-12


def test_weights_that_no_output_depends_on_are_kept():
    """φ_h and φ_s of the last layer: a layer in between shows that they are compared with the right ones."""
    state = theirs().state_dict()
    layers = FastEGNN.from_published(state).layers
    for number, layer in enumerate(layers):
        for key, network in (("node_mlp", layer.phi_h), ("node_mlp_virtual", layer.virtual.phi_s)):
            for name, value in network.state_dict().items():
                assert torch.equal(value, state[f"gcl_{number}.{key}.{name}"])


def without(key: str) -> dict[str, Tensor]:
    return {name: value for name, value in theirs().state_dict().items() if name != key}


WRONG = {
    "missing": (lambda: without("gcl_1.node_mlp.2.bias"), r"key 'gcl_1\.node_mlp\.2\.bias' is missing"),
    "missing, first asked": (lambda: without("virtual_node_feat"), r"key 'virtual_node_feat' is missing"),
    "empty": (dict, r"key 'embedding_in\.weight' is missing"),
    "no layer": (lambda: {k: v for k, v in without("").items() if "gcl" not in k}, r"key 'gcl_0\..*' is missing"),
    "a layer": (lambda: {k: v for k, v in without("").items() if "gcl_1" not in k}, r"'gcl_1' are missing.*'gcl_2'"),
    "unknown": (lambda: without("") | {"gcl_0.extra": torch.zeros(1)}, r"unknown key 'gcl_0\.extra'"),
    "bias": (lambda: without("") | {"gcl_0.coord_mlp_r.2.bias": torch.zeros(1)}, r"unknown key 'gcl_0\.coord_mlp_r"),
    "other H": (
        lambda: without("") | {"gcl_2.edge_mlp.2.weight": torch.zeros(H + 1, H)},
        rf"'gcl_2\.edge_mlp\.2\.weight' has shape \({H + 1}, {H}\), expected \({H}, {H}\)",
    ),
    "H of the embedding": (
        lambda: without("") | {"embedding_in.weight": torch.zeros(64, F)},
        r"'gcl_0\.node_mlp\.0\.weight' has 20 columns.*3H = 192",
    ),
    "other C": (
        lambda: without("") | {"virtual_node_feat": torch.zeros(1, H, C + 1)},
        rf"'gcl_0\.edge_mlp_virtual\.0\.weight' has shape \({H}, {2 * H + 1 + C}\), expected \({H}, {2 * H + 2 + C}\)",
    ),
    "axes": (lambda: without("") | {"virtual_node_feat": torch.zeros(H, C)}, r"'virtual_node_feat'.*expected 3 axes"),
    "batch of s": (
        lambda: without("") | {"virtual_node_feat": torch.zeros(2, H, C)},
        rf"'virtual_node_feat' has shape \(2, {H}, {C}\), expected \(1, {H}, {C}\)",
    ),
    "no tensor": (lambda: without("") | {"epoch": 3}, r"'epoch'.*int"),
    "integers": (lambda: without("") | {"gcl_0.steps": torch.zeros(1, dtype=torch.long)}, r"'gcl_0\.steps'.*int64"),
    "twice": (
        lambda: without("") | {"module.embedding_in.bias": torch.zeros(H)},
        r"'embedding_in\.bias'.*twice",
    ),
    "half an attention": (
        lambda: {
            k: v for k, v in theirs(attention=True).state_dict().items() if not k.startswith("gcl_2.att_mlp_virtual")
        },
        r"key 'gcl_2\.att_mlp_virtual\.0\.weight' is missing",
    ),
    "gravity without its vector": (
        lambda: theirs(gravity=True).state_dict(),
        r"gravity_mlp.*model\.gravity",
    ),
}


@pytest.mark.parametrize(("state", "says"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(state, says):
    with pytest.raises(Failure, match=says) as caught:
        FastEGNN.from_published(state())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("gravity", "says"), [([0, 1, 0], "no gravity_mlp"), ([0, 1], "3 numbers")])
def test_a_vector_that_does_not_fit(gravity, says):
    with pytest.raises(Failure, match=says):
        FastEGNN.from_published(theirs().state_dict(), gravity=gravity)


NESTS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "deep": lambda state: {"checkpoint": {"model": {f"module.{k}": v for k, v in state.items()}}, "args": ["a"]},
}


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_several_shapes(tmp_path, nest, legacy):
    state = theirs().state_dict()
    torch.save(nest(state), tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    found = published_weights.normalize_keys(published_weights.read_state_dict(tmp_path / "a.pth"))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def evil_files(folder: Path) -> dict[str, Path]:
    """Files that run code when they are unpickled: as torch writes them, as pickle does, within weights and alone."""
    state = {**theirs().state_dict(), "note": Evil(folder / "ran")}
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "bare.pt").write_bytes(pickle.dumps(Evil(folder / "ran")))
    (folder / "system.pt").write_bytes(f"cposix\nsystem\n(S'touch {folder}/ran'\ntR.".encode())
    return {name: folder / f"{name}.pt" for name in ("zip", "old", "bare", "system")}


def test_code_in_a_file_is_not_run(tmp_path):
    for name, path in evil_files(tmp_path).items():
        says = rf"{name}\.pt: damaged, or .*could run code"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(Failure, match=says) as caught:
                published_weights.read_state_dict(path)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "ran").exists(), name
    # the trap works where it is let
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    pickle.loads((tmp_path / "system.pt").read_bytes())
    assert (tmp_path / "ran").exists()


def test_an_old_torch_does_not_read_foreign_files(tmp_path, monkeypatch):
    torch.save(theirs().state_dict(), tmp_path / "a.pt")
    published_weights.read_state_dict(tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(Failure, match=r"torch 2\.9\.1\+cpu.*install torch 2\.10"):
        published_weights.read_state_dict(tmp_path / "a.pt")


def damaged(folder: Path) -> dict[str, tuple[Path, str]]:
    buffer = io.BytesIO()
    torch.save(theirs().state_dict(), buffer)
    (folder / "half.pt").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (folder / "text.pt").write_text("weights\n")
    with zipfile.ZipFile(folder / "other.pt", "w") as file:
        file.writestr("readme", "weights")
    torch.save({"loss": 3.0, "w": torch.zeros(2)}, folder / "foreign.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"model": theirs().state_dict(), "ema": theirs().state_dict()}, folder / "both.pt")
    wrong = dict.fromkeys(("half", "text", "other"), "damaged") | {
        "absent": "no such file",
        "foreign": "no key 'virtual_node_feat'",
        "list": "no key 'virtual_node_feat'",
        "both": "2 state dicts, model and ema",
    }
    return {name: (folder / f"{name}.pt", says) for name, says in wrong.items()}


def test_files_that_are_none(tmp_path):
    for path, says in damaged(tmp_path).values():
        with pytest.raises(Failure, match=f"{path.name}: .*{says}") as caught:
            published_weights.read_state_dict(path)
        assert "\n" not in str(caught.value)


def wanted(folder: Path, *overrides: str) -> Any:
    return config.load(None, ["data.radius=0.27", "data.horizon=3", f"run.dir={folder}", *overrides])


def test_a_run_of_theirs_predicts_as_theirs(tmp_path, small, capsys):
    torch.save({"model": theirs(node=1).float().state_dict()}, tmp_path / "a.pth")
    data = [f"data.path={small}", "data.features=[speed,viscosity/max]", "data.node_attributes=[mass]", "data.frames=2"]
    run_import(tmp_path / "a.pth", wanted(tmp_path / "run", *data))
    assert re.search(rf"^  hidden +{H}$", capsys.readouterr().out, re.M)
    state = theirs(node=1).float().double()
    made = config.load(tmp_path / "run" / "config.yaml")
    samples = trainer.open_dataset(made, 0, 1)
    squares = []
    for number in samples.splits["test"]:
        graph = samples[number]
        for name in ("x", "v", "f", "a"):
            graph.ndata[name] = graph.ndata[name].double()
        graph.edata["e"] = graph.edata["e"].double()
        with torch.no_grad():
            squares.append((state(graph)[0] - graph.ndata["y"]) ** 2)
    error = float(torch.cat(squares).mean())
    found = run_evaluation(tmp_path / "run")
    assert found["FastEGNN"] == pytest.approx(error, rel=1e-4)
    assert dist_egnn.load(tmp_path / "run").features == ["speed", "viscosity/max"]


def test_the_run_it_makes_is_not_written_over(tmp_path):
    torch.save(theirs(node=0).state_dict(), tmp_path / "a.pth")
    run_import(tmp_path / "a.pth", wanted(tmp_path / "run"))
    with pytest.raises(Failure, match="holds a run already"):
        run_import(tmp_path / "a.pth", wanted(tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "overrides", "says"),
    [
        ({"edge": 3}, [], "3 edge attributes, samples have 2"),
        ({"node": 0}, ["data.features=[mass]"], r"data\.features=\[mass\]: 1, but the weights of .*a\.pth take 2"),
        ({"node": 2}, [], r"data\.node_attributes=\[\]: 0, but .* take 2"),
        ({"node": 0}, ["model.tanh=true"], r"model\.tanh=true"),
        ({"node": 0, "gravity": True}, [], r"a\.pth: published weights: .*model\.gravity"),
        ({"node": 0, "attention": True}, ["model.precision=bf16-messages"], r"model\.attention"),
    ],
)
def test_what_a_run_cannot_be_made_of(tmp_path, options, overrides, says):
    torch.save(theirs(**options).state_dict(), tmp_path / "a.pth")
    with pytest.raises(Failure, match=says):
        run_import(tmp_path / "a.pth", wanted(tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


def test_command(tmp_path, monkeypatch, capsys):
    torch.save(theirs(node=0, gravity=True).state_dict(), tmp_path / "a.pth")

    def command(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["distegnn", "import-checkpoint", *map(str, words)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    file, out = tmp_path / "a.pth", tmp_path / "run"
    assert command(file, "--radius", 1) == (
        2,
        "error: --out is missing: name the folder of the run to make, for example --out runs/published\n",
    )
    assert command(file, "--out", out)[0] == 2
    assert "model.gravity" in command(file, "--out", out, "--radius", 1)[1]
    model = ("model.normalize=true", "model.gravity=[-1,-9.81,0.5]")
    data = ("data.features=[charge/max, speed]", "data.horizon=7", "data.edge_drop=0.5")
    assert command(file, "--out", out, "--radius", 2, *model, *data) == (0, "")
    made = config.load(out / "config.yaml")
    assert (made.data.radius, made.data.horizon, made.data.edge_drop) == (2, 7, 0.5)
    assert made.data.features == ["charge/max", "speed"]
    m = made.model
    assert (m.name, m.hidden, m.layers, m.virtual_nodes) == ("FastEGNN", H, L, C)
    assert (m.normalize, m.attention, m.gravity) == (True, False, [-1.0, -9.81, 0.5])
    model = trainer.build_model(made, (F, 0), SingleProcess())
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in theirs(node=0, gravity=True).parameters()
    )
