"""Weights from the command line and the config reach the tables of a store; invalid ones fail before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from dgl import load_graphs
from dist_egnn.partition import assign, store_writer
from typer.testing import CliRunner

from dist_egnn import cli
from dist_egnn.commands.partition import run_partition
from dist_egnn.commands.train import resumed_config
from dist_egnn.config import Config, load, to_yaml
from dist_egnn.data import dataset
from dist_egnn.data.store import Store
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.errors import Failure


def content(path: Path) -> dict[str, str]:
    """The content of a store. graph.dgl is compared by its edges, because DGL writes memory addresses into it."""
    store = Store(path)
    hashes = {name: digest for name, digest in store.manifest["files"].items() if not name.endswith("graph.dgl")}
    graphs = {
        str(file.relative_to(path)): repr([tensor.tolist() for tensor in load_graphs(str(file))[0][0].edges()])
        for file in path.rglob("graph.dgl")
    }
    return hashes | graphs | {"inputs": repr(store.inputs)}


def owned(store: Store) -> np.ndarray:
    """Nodes by snapshot and process (S, P)."""
    return store.parts_table["nodes"].to_numpy().reshape(len(store.snapshots), store.parts)


@pytest.mark.parametrize("method", ["bisection", "morton", "random", "metis"])
@pytest.mark.parametrize(
    ("parts", "trainers", "weights"), [(3, 1, [2, 1, 1]), (2, 2, [3, 1, 2, 2]), (2, 2, [2, 2, 1, 1])]
)
def test_every_snapshot_follows_the_weights(make_store, method, parts, trainers, weights):
    """The share of a part is the sum of its trainers' shares."""
    if method == "metis":
        pytest.importorskip("pymetis", reason="METIS follows weights through pymetis, which is not installed")
    store = Store(make_store(parts, method, trainers=trainers, weights=weights))
    share = store.snapshots["nodes"].to_numpy()[:, None] * np.array(weights) / sum(weights)
    assert (np.abs(owned(store) - share) <= np.maximum(2, 0.05 * share)).all()
    assert store.inputs["weights"] == weights
    assert store.summary()["balance"] == pytest.approx((owned(store) / share).max(1).mean())


@pytest.mark.parametrize("method", assign.METHODS)
def test_equal_weights_write_the_same_store(small, make_store, make_inputs, tmp_path, method):
    plain = make_store(2, method, trainers=2)
    store_writer.write_store(
        Trajectories(small), tmp_path / "store", make_inputs(2, method, trainers=2, weights=[5] * 4), lambda *_: None
    )
    assert content(tmp_path / "store") == content(plain)


def test_an_old_store_without_weights(make_store, make_inputs, small, tmp_path):
    """It is read, and the same command finds it complete."""
    path = Path(shutil.copytree(make_store(2), tmp_path / "store"))
    manifest = yaml.safe_load((path / "manifest.yaml").read_text())
    del manifest["inputs"]["weights"]
    (path / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    assert Store(path).inputs["weights"] is None
    assert store_writer.write_store(Trajectories(small), path, make_inputs(2), lambda *_: None) is False
    with pytest.raises(Failure, match="exists and is not a store of these settings"):
        store_writer.write_store(Trajectories(small), path, make_inputs(2, "morton", weights=[2, 1]), lambda *_: None)


def test_config_and_store(make_store):
    """Null accepts any store; other weights must equal the store's up to a factor."""
    weighted, equal = make_store(2, "morton", weights=[2, 1]), make_store(2, "morton")

    def parts(path: Path, *more: str) -> int:
        return dataset.part_count(load(None, [f"data.path={path}", *more]))

    assert parts(weighted) == parts(weighted, "partition.weights=[4,2]") == 2
    assert parts(equal, "partition.weights=[7,7]") == 2
    with pytest.raises(Failure, match=r"partition\.weights=\[1,2\], but .* was made with \[2,1\]; partition again"):
        parts(weighted, "partition.weights=[1,2]")
    with pytest.raises(Failure, match=r"partition\.weights=\[2,1\], but .* was made with null; partition again"):
        parts(equal, "partition.weights=[2,1]")
    with pytest.raises(Failure, match=r"partition\.weights=\[2,1,1\]: 3 weights for 2 processes"):
        parts(weighted, "partition.weights=[2,1,1]")


def test_more_weights_than_processes(small):
    with pytest.raises(Failure, match="2 weights for 1 processes"):
        dataset.part_count(load(None, [f"data.path={small}", "partition.weights=[2,1]"]))
    with pytest.raises(Failure, match="2 weights for 3 processes"):
        load(None, ["partition.parts=3", "partition.weights=[2,1]"])
    with pytest.raises(Failure, match="must be positive numbers"):
        load(None, ["partition.weights=[2,-1]"])
    with pytest.raises(Failure, match="must be positive numbers"):
        load(None, ["partition.weights=[2,.nan]"])


def test_invalid_weights_write_nothing(small, make_inputs, tmp_path):
    inputs = make_inputs(2, "morton", weights=[1000, 1])
    with pytest.raises(Failure, match=r"weights=\[1000,1\]: process 1 would get 0\.2 of 200 nodes; raise its weight"):
        store_writer.write_store(Trajectories(small), tmp_path / "store", inputs, lambda *_: None)
    with pytest.raises(Failure, match="method=kmeans: does not follow weights"):
        make_inputs(2, "kmeans", weights=[2, 1])
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_a_file_partitions_by_its_weights(small, tmp_path):
    from small_data import DATA

    config = Config()
    for name, value in DATA.items():
        setattr(config.data, name, value)
    config.data.path, config.partition.parts = str(small), 2
    config.partition.method, config.partition.weights = "bisection", [3.0, 1.0]
    run_partition(config, tmp_path / "store")
    assert owned(Store(tmp_path / "store"))[0].tolist() == [150, 50]
    assert dataset.part_count(config) == 2


def test_a_resume_on_other_parts_drops_the_weights(tmp_path, monkeypatch):
    """Weights are dropped when a resumed run changes the number of parts."""
    monkeypatch.setattr("dist_egnn.train.run_dir.check_is_run", lambda run: None)
    (tmp_path / "config.yaml").write_text(to_yaml(load(None, ["partition.parts=2", "partition.weights=[2,1]"])))

    def weights(*words: str) -> list[float] | None:
        return resumed_config(tmp_path, words).partition.weights

    assert weights() == weights("train.epochs=3") == [2, 1]
    assert weights("partition.parts=3") is weights("data.path=store") is None
    assert weights("partition.parts=3", "partition.weights=[1,1,2]") == [1, 1, 2]


def test_command_line(small, tmp_path):
    def ran(*words: str) -> tuple[int, str, BaseException | None]:
        result = CliRunner().invoke(cli.app, ["partition", str(small), "--radius", "0.27", *words])
        return result.exit_code, result.output, result.exception

    out = str(tmp_path / "store")
    code, text, _ = ran("--parts", "3", "--method", "morton", "--weights", "2,1,1", "data.horizon=3", "--out", out)
    assert code == 0, text
    assert owned(Store(out))[0].tolist() == [100, 50, 50]
    code, text, _ = ran("--parts", "3", "--weights", "2,1,1", "data.horizon=3", "--method", "morton", "--compare")
    assert code == 0, text
    assert "bisection" in text
    assert "kmeans" not in text
    for wrong, message in (("2,one", "--weights 2,one"), ("2,1", "2 weights for 3 processes")):
        *_, error = ran("--parts", "3", "--method", "morton", "--weights", wrong, "--out", str(tmp_path / "other"))
        assert isinstance(error, Failure)
        assert message in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
