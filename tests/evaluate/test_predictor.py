"""dist_egnn.load: arrays in, predicted positions out, equal to what the run's evaluation predicts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import random_pairs

import dist_egnn
from dist_egnn import config
from dist_egnn.data.dataset import open_dataset
from dist_egnn.data.samples import select_snapshots
from dist_egnn.data.trajectories import Trajectories, Writer
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.train import checkpoint, trainer

ROOT = Path(__file__).parents[2]
DATA = ["data.velocity_scale=4", "data.radius=0.27", "data.horizon=3", "data.frames=2", "data.edge_drop=0.25"]
FEATURES = ["data.features=[speed,viscosity/max,mass]", "data.node_attributes=[viscosity]"]
# name → overrides of a run whose model is written, not trained: what it predicts is compared, not judged
RUNS = {
    "named": FEATURES,
    "all of them": [],  # data.features: null
    "speed alone": ["data.features=[speed]"],
    "EGNN": [*FEATURES, "model.name=EGNN"],
    "Linear": [*FEATURES, "model.name=Linear"],
    "options": [*FEATURES, "model.attention=true", "model.normalize=true", "model.gravity=[0,-9.81,0]"],
    "knn": [*FEATURES, "data.radius=.inf", "data.edges=knn", "data.neighbours=5"],
    "given": [*FEATURES, "data.radius=.inf", "data.edges=given"],
    "complete graph": [*FEATURES, "data.radius=.inf", "data.edge_drop=0.9"],
}


def settings(small: Path, folder: Path, *overrides: str) -> config.Config:
    model = ["model.hidden=8", "model.layers=2", "train.batch_size=1"]
    return config.load(None, [f"data.path={small}", f"run.dir={folder}", *DATA, *model, *overrides])


def write(chosen: config.Config, seed: int = 0) -> Path:
    """A run's folder with a checkpoint whose weights are all drawn at full size. Returns the checkpoint."""
    model = trainer.build_model(chosen, open_dataset(chosen, 0, 1).widths, SingleProcess())
    torch.manual_seed(seed)
    for value in model.parameters():
        value.data = torch.randn_like(value) / max(value.shape or (1,)) ** 0.5
    folder = Path(chosen.run.dir)
    folder.mkdir()
    checkpoint.save(folder / "best.pt", checkpoint.weights_only(model, chosen))
    (folder / "config.yaml").write_text(config.to_yaml(chosen))
    return folder / "best.pt"


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> Path:
    """A trained run of the settings `named`."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    trainer.train(SingleProcess(), settings(small, folder, *FEATURES, "train.epochs=1"))
    return folder


Snapshot = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], np.ndarray]


def inputs(small: Path, settings: config.Config, split: str = "test") -> list[Snapshot]:
    """Positions, velocities, attributes by name and true later positions of a split's snapshots, from the file."""
    file, d, result = Trajectories(small), settings.data, []
    for s in select_snapshots(file, d.horizon, d.frames, d.first_frame, d.last_frame, d.frame_seed):
        if s.split == split:
            attributes = {name: file.attribute(s.trajectory, name) for name in file[s.trajectory].attributes}
            x, y = (file.position(s.trajectory, frame) for frame in (s.frame, s.frame + d.horizon))
            result.append((x, file.velocity(s.trajectory, s.frame), attributes, y))
    return result


@pytest.mark.parametrize("name", RUNS)
def test_predicts_what_evaluation_predicts(name, small, tmp_path):
    chosen = settings(small, tmp_path / "run", *RUNS[name])
    path = write(chosen)
    # the model as `distegnn evaluate` makes it
    samples = open_dataset(chosen, 0, 1)
    model = trainer.build_model(chosen, samples.widths, SingleProcess())
    checkpoint.load_weights(model, checkpoint.load(path), path)
    model.eval()
    predict = dist_egnn.load(path)
    cases = inputs(small, chosen)
    assert len(cases) == 2
    given = {"edges": random_pairs(210, 3)} if name == "given" else {}
    for number, (x, v, attributes, _) in zip(samples.splits["test"], cases, strict=True):
        with torch.no_grad():
            y, z = model(samples[number])
        assert float((y - torch.from_numpy(x)).abs().max()) > 1e-3
        predicted, virtual = predict.with_virtual(x, v, attributes, **given)
        assert predicted.dtype == np.float32
        np.testing.assert_array_equal(predicted, y.numpy())
        np.testing.assert_array_equal(virtual, z[0].numpy())
    if given:
        with pytest.raises(Failure, match=r"data\.edges=given: .*edges="):
            predict(x, v, attributes)


def test_periodic_box(tmp_path):
    """Edges across the boundary, as in the sample; a box where the run has one, and only there."""
    draw = np.random.default_rng(0)
    v = draw.normal(scale=0.02, size=(80, 3))
    position = draw.uniform(size=(80, 3)) + v * np.arange(6)[:, None, None]
    box = np.array([[0.0, 0.1, 0.0], [1.0, 1.1, 1.3]])
    given = {"mass": draw.uniform(size=80), "viscosity": np.ones(80)}
    with Writer(tmp_path / "a.h5", {}) as out:
        for split in ("train", "valid", "test"):
            out.add(position, split=split, dt=1.0, source="test", attributes=given, box=box, periodic=True)
    chosen = settings(tmp_path / "a.h5", tmp_path / "run", *FEATURES, "data.periodic=true")
    predict = dist_egnn.load(write(chosen))
    samples = open_dataset(chosen, 0, 1)
    graph = samples[samples.splits["test"][0]]
    assert bool(graph.edata["shift"].any())
    with torch.no_grad():
        y, z = predict.model(graph)
    (x, v, given, _), *_ = inputs(tmp_path / "a.h5", chosen)
    for one in (box, box.tolist(), torch.from_numpy(box)):
        for result, expected in zip(predict.with_virtual(x, v, given, box=one), (y, z[0]), strict=True):
            np.testing.assert_array_equal(result, expected.numpy())
    wrong = {
        "needs a box": None,
        r"box has shape \(3,\)": box[1],
        r"box: .* is NaN": box + np.nan,
        "shortest side": box / 2,
    }
    for message, one in wrong.items():
        with pytest.raises(Failure, match=message):
            predict(x, v, given, box=one)
    open_run = dist_egnn.load(write(settings(tmp_path / "a.h5", tmp_path / "open", *FEATURES)))
    assert not np.array_equal(open_run(x, v, given), y.numpy())
    with pytest.raises(Failure, match="leave the box out"):
        open_run(x, v, given, box=box)


@pytest.mark.parametrize("split", ["test", "valid"])
def test_errors_are_those_of_evaluate(run, small, split):
    chosen, predict = config.load(run / "config.yaml"), dist_egnn.load(run)
    evaluated = trainer.evaluate(SingleProcess(), chosen, run / "best.pt", split)
    squares = [(predict(x, v, given).astype(np.float64) - y) ** 2 for x, v, given, y in inputs(small, chosen, split)]
    assert float(np.concatenate(squares).mean()) == pytest.approx(evaluated["FastEGNN"], rel=1e-12)


def test_a_checkpoint_alone_is_enough(run, small, tmp_path, monkeypatch):
    """Without its folder, its data, and from anywhere; a run's folder means its best.pt. No random number is drawn."""
    state = checkpoint.load(run / "best.pt")
    checkpoint.save(tmp_path / "one.pt", {**state, "config": state["config"].replace(str(small), "gone.h5")})
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    one = dist_egnn.load("one.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert one.config.data.path == "gone.h5"
    x, v, given, _ = inputs(small, config.load(run / "config.yaml"))[0]
    for path in (run, str(run / "best.pt")):
        np.testing.assert_array_equal(one(x, v, given), dist_egnn.load(path)(x, v, given))


def test_kinds_of_input(run, small):
    """Tensors, of any dtype and grad; lists; views; features as arrays: one result. What is given stays as it was."""
    predict = dist_egnn.load(run)
    x, v, given, _ = inputs(small, predict.config)[0]
    expected = predict(x, v, given)
    f = np.stack([np.linalg.norm(v, axis=1), given["viscosity"] / given["viscosity"].max(), given["mass"]], 1)
    a = given["viscosity"][:, None]
    original = x.copy(), v.copy()
    viscosity, by_name = {"viscosity": given["viscosity"]}, {key: torch.from_numpy(a) for key, a in given.items()}
    same = [
        predict(x.astype(np.float64), v.astype(np.float64), given),
        predict(x[::-1].copy()[::-1], v, given | {"unused": np.zeros(3)}),
        predict(x.tolist(), v.tolist(), {key: value.tolist() for key, value in given.items()}),
        predict(x, v, f, node_attributes=a),
        predict(x, torch.from_numpy(v), torch.from_numpy(f), node_attributes=viscosity),
        predict(x, v, {**viscosity, "mass": given["mass"]}, node_attributes=a),
    ]
    assert all(isinstance(y, np.ndarray) and np.array_equal(y, expected) for y in same)
    for tensor in (torch.from_numpy(x), torch.from_numpy(x).double().requires_grad_()):
        y, z = predict.with_virtual(tensor, torch.from_numpy(v), by_name)
        assert isinstance(y, torch.Tensor)
        assert isinstance(z, torch.Tensor)
        assert (y.dtype, y.requires_grad, z.shape) == (torch.float32, False, (3, 3))
        np.testing.assert_array_equal(y.numpy(), expected)
    y[:] = 0  # what is returned belongs to the caller
    np.testing.assert_array_equal(predict(x, v, given), expected)
    np.testing.assert_array_equal((x, v), original)


def test_positions_far_from_zero(run, small):
    """The prediction moves with float64 positions of which float32 would lose digits."""
    predict, shift = dist_egnn.load(run), np.array([5e6, -4e6, 0])
    x, v, given, _ = inputs(small, predict.config)[0]
    near, far = predict.with_virtual(x, v, given), predict.with_virtual(x + shift, v, given)
    for a, b in zip(near, far, strict=True):
        np.testing.assert_allclose(b - shift, a, atol=2e-5)
    with pytest.raises(Failure, match="float32 resolves"):
        predict((x + shift).astype(np.float32), v, given)


def test_one_node_and_far_ones(run):
    """Without any edge."""
    predict = dist_egnn.load(run)
    for n in (1, 2):
        x = np.arange(n, dtype=float)[:, None] * np.ones(3)
        given = {"mass": np.ones(n), "viscosity": np.ones(n)}
        assert np.isfinite(predict(x, np.ones((n, 3)), given)).all()


def test_wrong_input_is_named(run):
    predict, x, v, f, ones = dist_egnn.load(run), np.zeros((4, 3)), np.ones((4, 3)), np.ones((4, 3)), np.ones(4)
    given, bad = {"mass": ones, "viscosity": ones}, np.zeros((4, 3))
    bad[2, 1] = np.nan
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        (r"positions has shape \(3, 4\), expected \(N, 3\)", (x.T, v, given), {}),
        (r"positions has shape \(4,\)", (ones, v, given), {}),
        (r"positions: no node", (x[:0], v[:0], given), {}),
        (r"positions: \[2.* is NaN or infinite", (bad, v, given), {}),
        (r"positions: \[0.* is too large", (x + 1e300, v, given), {}),
        (r"positions: not an array of numbers", (["a"], v, given), {}),
        (r"positions: not an array of numbers", (None, v, given), {}),
        (r"velocities has shape \(3, 3\), expected \(4, 3\)", (x, v[:3], given), {}),
        (r"velocities: \[2.* is NaN or infinite", (x, bad, given), {}),
        (r"features: 'viscosity' is missing.*\(given: mass\)", (x, v, {"mass": ones}), {}),
        (r"features: 'viscosity' is missing.*\(given: none\)", (x, v), {}),
        (r"features: 'mass' has shape \(3,\), expected \(4,\)", (x, v, given | {"mass": ones[:3]}), {}),
        (r"features: 'mass': \[1.* is NaN or infinite", (x, v, given | {"mass": [1, np.inf, 1, 1]}), {}),
        (r"features has shape \(4, 2\), expected \(4, 3\)", (x, v, f[:, :2]), {}),
        (r"node_attributes: 'viscosity' is missing", (x, v, f), {}),
        (r"node_attributes has shape \(4, 2\), expected \(4, 1\)", (x, v, f), {"node_attributes": f[:, :2]}),
    ]
    for message, arguments, options in wrong:
        with pytest.raises(Failure, match=message) as caught:
            predict(*arguments, **options)
        assert "\n" not in str(caught.value)


def test_all_features_are_counted(small, tmp_path):
    """A run with data.features: null knows how many attributes it was trained with, not which."""
    predict = dist_egnn.load(write(settings(small, tmp_path / "run")))
    x, v = np.zeros((4, 3)), np.ones((4, 3))
    with pytest.raises(Failure, match=r"all attributes .* given are 2 columns of mass"):
        predict(x, v, {"mass": np.ones(4)})
    columns = np.stack([np.ones(4), np.arange(4), np.full(4, 3**0.5)], 1)
    np.testing.assert_array_equal(predict(x, v, {"b": np.arange(4), "a": np.ones(4)}), predict(x, v, columns))


def test_what_cannot_be_loaded(run, tmp_path):
    state = checkpoint.load(run / "best.pt")
    configs = {"key": "model: {nome: EGNN}", "yaml": "model: {"}
    configs["other"] = state["config"].replace("hidden: 8", "hidden: 9")
    for name, text in configs.items():
        checkpoint.save(tmp_path / f"{name}.pt", {**state, "config": text})
    torch.save(state["model"], tmp_path / "bare.pt")
    wrong = {
        "absent.pt": "no such checkpoint",
        "": "best.pt: no such checkpoint",
        "key.pt": r"key\.pt: its config: unknown key 'model\.nome'; did you mean model\.name",
        "yaml.pt": r"yaml\.pt: its config: not readable as YAML",
        "other.pt": r"other\.pt: its weights do not fit this model: size mismatch.{,150}; .*config\.yaml",
        "bare.pt": "not a checkpoint of dist_egnn",
    }
    for name, message in wrong.items():
        with pytest.raises(Failure, match=message):
            dist_egnn.load(tmp_path / name)
    for device in ("gpu", "cuda:99"):
        with pytest.raises(Failure, match=f"device={device}: "):
            dist_egnn.load(run, device=device)


def test_the_page_works(run, tmp_path, monkeypatch, capsys):
    """docs/inference.md's code, on a run of these features that has the name given there."""
    page = (ROOT / "docs" / "inference.md").read_text()
    block, on_two_processes, *_ = re.findall(r"```python[^\n]*\n(.*?)```", page, re.S)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "fluid").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block, found)
    assert capsys.readouterr().out == "(1000, 3) float32 (3, 3)\n"
    assert torch.equal(found["same"], torch.from_numpy(found["later"]))
    exec(on_two_processes, found)
    np.testing.assert_allclose(found["later"], found["same"], atol=1e-5)
