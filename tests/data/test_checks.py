"""What arrays and files from outside must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dist_egnn import Trajectories, Writer
from dist_egnn.data import checks, prepare
from dist_egnn.errors import Failure

X = np.random.default_rng(0).uniform(size=(30, 3)) + 0.01 * np.arange(9)[:, None, None]
Q = np.arange(30.0)
MASKED = np.ma.array(X, mask=X > 0.5)


def write(path: Path, position: Any = X, count: int = 1, **more: Any) -> Path:
    with Writer(path, {}) as out:
        for _ in range(count):
            out.add(position, **{"split": "train", "dt": 1.0, "source": "test", **more})
    return path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(({"dt": dt}, "dt=") for dt in (np.nan, 0, -1, np.inf, "fast")),
        *(({"attributes": {name: Q}}, "attribute .*rename it") for name in ("speed", "charge/e", "", "a\0b", "a=b")),
        ({"attributes": {"element": np.array(["O"] * 30)}}, "attributes/element: not an array of numbers"),
        ({"attributes": {"id": np.arange(30) + 2**24}}, r"attributes/id: \[1\] is an integer that float32 rounds"),
        ({"attributes": {"a": Q * 1e39}}, r"attributes/a: \[1\] is too large for float32"),
        ({"position": X + 1j}, "position: .*complex128"),
        ({"position": MASKED}, "position: has masked values"),
        ({"position": np.where(X > 1.03, np.nan, X)}, r"position: \[\d+, \d+, \d\] is NaN"),
        ({"position": X + 5e6}, "frame 0: position: nodes are .* subtract a constant"),
        ({"box": np.array([[0, 0, 0], [1, 0, 1.0]])}, "box .* positive sides"),
    ],
)
def test_the_writer_refuses(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(Failure, match=rf"a\.h5: trajectory 000000.*{message}") as caught:
        write(tmp_path / "a.h5", **given)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_meta_of_numpy_and_paths(tmp_path: Path) -> None:
    with Writer(tmp_path / "a.h5", {"seed": np.int64(1), "from": Path("a")}) as out:
        out.add(X.tolist(), split=np.str_("train"), dt=1, source="s")
    assert Trajectories(tmp_path / "a.h5").meta == {"seed": 1, "from": "a"}
    with pytest.raises(Failure, match="meta cannot be stored"):
        Writer(tmp_path / "b.h5", {"what": object()})


def test_files_of_other_programs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", X, count=11)
    with h5py.File(path, "r+") as file:
        for k, group in enumerate(list(file["trajectories"].values())):
            del group["position"]
            group["position"] = (X * 100 + k).astype((">f4", "<i4", "<f2")[k % 3])
            group.attrs["split"] = np.bytes_("train")
            file.move(group.name, f"/trajectories/{k}")
    data = Trajectories(path)
    assert [one.name for one in data] == [str(k) for k in range(11)]
    for k in range(3):
        x = data.position(k, 1)
        assert x.dtype == np.dtype("float32")
        np.testing.assert_allclose(x, X[1] * 100 + k, atol=1)
    data.close()
    with h5py.File(path, "r+") as file:
        file["trajectories/99"] = h5py.ExternalLink("gone.h5", "/x")
    with pytest.raises(Failure, match=r"a\.h5: trajectory 99: no group, or a link"):
        Trajectories(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda group: group.attrs.update(dt=-1.0), "dt=-1.0 must be positive"),
        (lambda group: group.attrs.update(split="all"), "'split'|split"),
        (lambda group: group.create_dataset("attributes/speed", data=Q), "'speed'"),
        (lambda group: group.create_dataset("attributes/z", data=Q + 1j), "'attributes/z' does not hold real numbers"),
        (lambda group: group.create_dataset("box", data=np.zeros((2, 3))), "box .* positive sides"),
    ],
)
def test_the_reader_refuses_what_the_writer_does(tmp_path: Path, change: Any, message: str) -> None:
    path = write(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        change(file["trajectories/000000"])
    with pytest.raises(Failure, match=rf"a\.h5: trajectory 000000: .*({message})"):
        Trajectories(path)


def test_velocities_in_all_trajectories_or_none(tmp_path: Path) -> None:
    match = r"a\.h5: trajectory 0 stores velocities, trajectory 1 does not"

    def mixed() -> None:
        with Writer(tmp_path / "a.h5", {}) as out:
            for velocity in (X, None):
                out.add(X, split="train", dt=1.0, source="test", velocity=velocity)

    with pytest.raises(Failure, match=match):
        mixed()


def test_doubtful_motion_and_units(tmp_path: Path) -> None:
    assert checks.check_content(Trajectories(write(tmp_path / "good.h5"))) == ({}, [])
    drift = (X + 0.1 * np.arange(9)[:, None, None]) % 1.0
    counts, lines = checks.check_content(Trajectories(write(tmp_path / "wrapped.h5", drift, count=2)))
    assert counts == {checks.WRAPPED: 2}
    assert "wrapped.h5: trajectory 0, frame" in lines[0]
    assert "dist_egnn.unwrap" in lines[0]
    order = np.random.default_rng(1)
    shuffled = write(tmp_path / "s.h5", np.stack([order.permutation(frame) for frame in X]))
    with pytest.raises(Failure, match=r"s\.h5: trajectory 0, frame 0: position: nodes are in another order"):
        checks.check_content(Trajectories(shuffled))
    per_frame = np.full_like(X, 0.01)  # instead of 0.01 / dt
    data = Trajectories(write(tmp_path / "v.h5", velocity=per_frame, dt=0.1))
    counts, lines = checks.check_content(data)
    assert counts == {"unit of velocity": 1}
    assert "v.h5: trajectory 0, frame 0: velocity · dt is 0.1 times" in lines[0]


def test_the_manifest_of_a_recipe_counts_doubts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make(k: int) -> list[dict[str, Any]]:
        return [{"position": X, "velocity": np.full_like(X, 0.01), "dt": 0.1, "split": "train", "source": "test"}]

    prepare.write(tmp_path / "v.h5", make, 2, settings={}, workers=1, threads=True)
    manifest = json.loads((tmp_path / "v.h5.manifest.json").read_text())
    assert manifest["warnings"] == {"unit of velocity": 2}
    assert "warning: " in capsys.readouterr().err


def test_what_readers_refuse_does_not_replace_a_file(tmp_path: Path) -> None:
    order = np.random.default_rng(1)
    shuffled = np.stack([order.permutation(frame) for frame in X])
    before = write(tmp_path / "v.h5").read_bytes()
    with pytest.raises(Failure, match=r"trajectory 0, frame 0: position: nodes are in another order"):
        prepare.write(
            tmp_path / "v.h5",
            lambda k: [{"position": shuffled, "dt": 0.1, "split": "train", "source": "test"}],
            1,
            settings={},
            workers=1,
            threads=True,
        )
    assert (tmp_path / "v.h5").read_bytes() == before


def test_a_foreign_file_far_from_zero(tmp_path: Path) -> None:
    with h5py.File(path := write(tmp_path / "far.h5"), "a") as file:
        file.visititems(
            lambda name, item: item.write_direct(np.float32(X + 5e6)) if name.endswith("/position") else None
        )
    with pytest.raises(Failure, match=r"far\.h5: trajectory 0, frame 0: position: nodes are .* subtract a constant"):
        checks.check_content(Trajectories(path))
