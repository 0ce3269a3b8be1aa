"""Weights from the command line and the config reach the tables of a store; invalid ones fail before any work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dist_egnn.partition import assign, store_writer
from small_data import DATA
from store_content import content
from typer.testing import CliRunner

from dist_egnn import cli
from dist_egnn.commands.partition import run_partition
from dist_egnn.commands.train import resumed_config
from dist_egnn.config import Config, Data, Partition, load, to_yaml
from dist_egnn.data import dataset
from dist_egnn.data.store import Store
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.errors import Failure


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
    inputs = make_inputs(2, method, trainers=2, weights=[5] * 4)
    store_writer.write_store(Trajectories(small), tmp_path / "store", inputs, lambda *_: None)
    assert content(tmp_path / "store") == content(make_store(2, method, trainers=2))


def test_config_and_store(small, make_store):
    """Null accepts any store; other weights must equal the store's up to a factor."""
    weighted, equal = make_store(2, "morton", weights=[2, 1]), make_store(2, "morton")

    def parts(path: Path, *more: str) -> int:
        return dataset.part_count(load(None, [f"data.path={path}", *more]))

    assert parts(weighted) == parts(weighted, "partition.weights=[4,2]") == 2
    assert parts(equal, "partition.weights=[7,7]") == 2
    for store, weights, message in (
        (
            weighted,
            "[1,2]",
            r"\[1,2\], but .* was made with \[2,1\]; .*`distegnn partition .*-2 .* --weights 1\.0,2\.0",
        ),
        (equal, "[2,1]", r"\[2,1\], but .* was made with null; .*`distegnn partition .*-2 .* --weights 2\.0,1\.0"),
        (weighted, "[2,1,1]", r"\[2,1,1\]: 3 weights for 2 processes"),
        (small, "[2,1]", r"\[2,1\]: 2 weights for 1 processes"),
        (small, "[2,-1]", r"\[2,-1\]: must be positive"),
        (small, "[2,.nan]", r"\[2,nan\]: must be positive"),
    ):
        with pytest.raises(Failure, match=rf"partition\.weights={message}"):
            parts(store, f"partition.weights={weights}")
    with pytest.raises(Failure, match="2 weights for 3 processes"):
        load(None, ["partition.parts=3", "partition.weights=[2,1]"])


def test_invalid_weights_write_nothing(small, make_inputs, tmp_path):
    inputs = make_inputs(2, "morton", weights=[1000, 1])
    with pytest.raises(Failure, match=r"weights=\[1000,1\]: process 1 would get 0\.2 of 200 nodes; raise its weight"):
        store_writer.write_store(Trajectories(small), tmp_path / "store", inputs, lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_a_file_partitions_by_its_weights(small, tmp_path):
    config = Config(data=Data(path=str(small), **DATA))
    config.partition = Partition(parts=2, method="bisection", weights=[3.0, 1.0])
    run_partition(config, tmp_path / "store")
    assert owned(Store(tmp_path / "store"))[0].tolist() == [150, 50]
    assert dataset.part_count(config) == 2


def test_a_resume_on_other_parts_drops_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_egnn.train.run_dir.check_is_run", lambda run: None)
    (tmp_path / "config.yaml").write_text(to_yaml(load(None, ["partition.parts=2", "partition.weights=[2,1]"])))

    def weights(*words: str) -> list[float] | None:
        return resumed_config(tmp_path, words).partition.weights

    assert weights() == weights("train.epochs=3") == [2, 1]
    assert weights("partition.parts=3") is weights("data.path=store") is None
    assert weights("partition.parts=3", "partition.weights=[1,1,2]") == [1, 1, 2]


def test_command_line(small, tmp_path):
    def invoke(weights: str, *more: str) -> tuple[str, str]:
        words = ["partition", str(small), "--radius", "0.27", "--parts", "3", "--method", "morton", "data.horizon=3"]
        result = CliRunner().invoke(cli.app, [*words, "--weights", weights, *more])
        return result.output, str(result.exception)

    assert invoke("2,1,1", "--out", str(tmp_path / "store"))[1] == "None"
    assert owned(Store(tmp_path / "store"))[0].tolist() == [100, 50, 50]
    table, error = invoke("2,1,1", "--compare")
    assert ("bisection" in table, "kmeans" in table, error) == (True, False, "None")
    for wrong, message in (("2,one", "--weights 2,one"), ("2,1", "2 weights for 3 processes")):
        assert message in invoke(wrong, "--out", str(tmp_path / "other"))[1]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
