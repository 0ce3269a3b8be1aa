"""recipes/water3d: files of GNS are read, damaged ones rejected."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import recipe_modules
from gns_files import METADATA, RECIPE, framed, needs_records, record, run, trajectories
from processes import kill, wait_until

from dist_egnn import config
from dist_egnn.commands.import_data import run_import
from dist_egnn.data.importers.series import ImportOptions
from dist_egnn.data.samples import SampleSpec, Snapshot, node_fields
from dist_egnn.data.trajectories import SPLITS, Trajectories
from dist_egnn.errors import Failure


def check_content(path: Path, counts: tuple[int, int, int]) -> None:
    """The file holds trajectories(), ``counts`` of each split."""
    data = Trajectories(path)
    expected = [
        (split, *arrays) for (split, all_), n in zip(trajectories().items(), counts, strict=True) for arrays in all_[:n]
    ]
    assert len(data) == len(expected)
    for k, (split, kind, position) in enumerate(expected):
        assert data[k].split == split
        assert data[k].dt == METADATA["dt"]
        assert data[k].source.startswith(f"GNS Water-3D, {split}")
        assert data[k].frames == len(position)
        for t, x in enumerate(position):
            np.testing.assert_array_equal(data.position(k, t), x)
        np.testing.assert_array_equal(data.attribute(k, "type"), kind)
        np.testing.assert_array_equal(data.box(k), np.array(METADATA["bounds"], "f4").T)


@needs_records
def test_tfrecords_are_read_as_written(gns_folder, water3d, tmp_path):
    """All at full scale, 4 + 1 + 1 at tiny; processes and threads give the same bytes."""
    a, b, c = (tmp_path / f"{name}.h5" for name in "abc")
    done = run("--source", gns_folder, "--scale", "full", "--out", a, "--workers", 2)
    assert done.returncode == 0, done.stderr
    water3d.run(["--source", str(gns_folder), "--scale", "full", "--out", str(b), "--workers", "1"])
    water3d.run(["--source", str(gns_folder), "--scale", "tiny", "--out", str(c)])
    check_content(a, (5, 2, 1))
    check_content(c, (4, 1, 1))
    assert a.read_bytes() == b.read_bytes()
    manifest = json.loads((tmp_path / "a.h5.manifest.json").read_text())
    assert manifest["sha256"] == hashlib.sha256(a.read_bytes()).hexdigest()


def test_hdf5_form_is_read_as_written(hdf5_folder, water3d, tmp_path):
    water3d.run(["--source", str(hdf5_folder), "--scale", "full", "--out", str(tmp_path / "a.h5")])
    check_content(tmp_path / "a.h5", (5, 2, 1))


@pytest.mark.parametrize("axes", [(True, True, True), (True, False, False)])
def test_lagrangebench_metadata_sets_the_time_step_and_unwraps(hdf5_folder, water3d, tmp_path, axes):
    """A particle crosses the low wall of the box in x; LagrangeBench stores every 4th step and wraps positions."""
    low, high = METADATA["bounds"][0]
    unwrapped = np.full((6, 2, 3), 0.5)
    unwrapped[:, 0, 0] = low + 0.13 - 0.05 * np.arange(6)
    wrapped = unwrapped.copy()
    wrapped[..., 0] = low + (unwrapped[..., 0] - low) % (high - low)
    assert (wrapped != unwrapped).any()
    for split in SPLITS:
        with h5py.File(hdf5_folder / f"{split}.h5", "w") as file:
            file["00000/particle_type"], file["00000/position"] = np.full(2, 5), wrapped.astype("f4")
    keys = {"write_every": 4, "periodic_boundary_conditions": axes}
    (hdf5_folder / "metadata.json").write_text(json.dumps(METADATA | keys))
    water3d.run(["--source", str(hdf5_folder), "--scale", "full", "--out", str(tmp_path / "a.h5")])
    data = Trajectories(tmp_path / "a.h5")
    assert data[0].axes == axes
    assert data[0].dt == pytest.approx(4 * METADATA["dt"])
    read = np.stack([data.position(0, t) for t in range(6)])
    np.testing.assert_allclose(read, unwrapped, atol=1e-6)


@needs_records
def test_import_reads_the_folder(gns_folder, tmp_path):
    """`distegnn import`: the same trajectories in the same splits; a damaged or truncated record is one line."""
    run_import([gns_folder], tmp_path / "a.h5", ImportOptions())
    data = Trajectories(tmp_path / "a.h5")
    expected = [(split, *arrays) for split, all_ in trajectories().items() for arrays in all_]
    assert [trajectory.split for trajectory in data] == [split for split, *_ in expected]
    for k, (_, kind, position) in enumerate(expected):
        assert (data[k].dt, data[k].periodic) == (METADATA["dt"], False)
        np.testing.assert_array_equal([data.position(k, t) for t in range(data[k].frames)], position)
        np.testing.assert_array_equal(data.attribute(k, "type"), kind)
        np.testing.assert_array_equal(data.box(k), np.array(METADATA["bounds"], "f4").T)
    flip(gns_folder / "test.tfrecord", 300)
    os.truncate(valid := gns_folder / "valid.tfrecord", valid.stat().st_size - 3)
    for name, message in (("test", "record 0: wrong checksum"), ("valid", "truncated within record 1")):
        with pytest.raises(Failure, match=f"{name}.tfrecord: {message}"):
            run_import([gns_folder / f"{name}.tfrecord"], tmp_path / "b.h5", ImportOptions())


@needs_records
def test_samples_and_run_py_of_gns_files(gns_folder, water3d, tmp_path, check_run_py):
    """The published features, ‖v‖ and type/max type, no node attributes; then the table of run.py."""
    water3d.run(["--source", str(gns_folder), "--scale", "tiny", "--out", str(tmp_path / "a.h5")])
    settings = config.load(RECIPE / "config.yaml").data
    features, attributes = tuple(settings.features or ()), tuple(settings.node_attributes)
    spec = SampleSpec(settings.radius, 2, features, attributes, velocity=settings.velocity)
    kind, position = trajectories()["train"][1]
    fields = node_fields(Trajectories(tmp_path / "a.h5"), Snapshot("train", 1, 3), spec)
    speed = np.linalg.norm(position[4] - position[3], axis=1)
    np.testing.assert_allclose(fields["f"], np.stack([speed, kind / kind.max()], 1), rtol=1e-6)
    assert fields["a"].shape == (9, 0)
    check_run_py(RECIPE, f"data.path={tmp_path / 'a.h5'}", "data.horizon=2", "data.radius=0.5")


def is_group(number: int) -> bool:
    """Whether a process group exists."""
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_killed_and_resumed_gives_the_same_bytes(hdf5_folder, water3d, tmp_path):
    """Killed after the first trajectory, while others remain."""
    whole, killed, parts = (tmp_path / name for name in ("whole.h5", "killed.h5", "killed.h5.parts"))
    options = ("--source", str(hdf5_folder), "--scale", "full", "--workers", "1", "--out")
    process = recipe_modules.start_first_part("water3d", *options, killed)
    wait_until((parts / "000000.h5").exists, "the first part", process)
    kill(process)
    wait_until(lambda: not is_group(process.pid), "the end of its workers")
    assert not killed.exists()
    water3d.run([*options, str(killed)])
    water3d.run([*options, str(whole)])
    assert killed.read_bytes() == whole.read_bytes()
    assert not parts.exists()


# --- damaged or missing files --------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def without(path: Path, key: str) -> None:
    path.write_text(json.dumps({k: v for k, v in METADATA.items() if k != key}), encoding="utf-8")


def first(folder: Path, payload: bytes) -> None:
    (folder / "train.tfrecord").write_bytes(framed(payload))


KIND, POSITION = trajectories()["train"][0]
DAMAGE = {
    "truncated": (
        lambda f: os.truncate(f / "train.tfrecord", (f / "train.tfrecord").stat().st_size - 3),
        "train.tfrecord: truncated within record 4; fetch it again",
    ),
    "length": (lambda f: flip(f / "valid.tfrecord", 2), "valid.tfrecord: record 0: wrong checksum of its length"),
    "payload": (lambda f: flip(f / "test.tfrecord", 300), "test.tfrecord: record 0: wrong checksum"),
    "empty": (lambda f: (f / "valid.tfrecord").write_bytes(b""), "valid.tfrecord: holds no trajectory"),
    "no file": (lambda f: (f / "test.tfrecord").unlink(), "test.tfrecord: no such file; --download fetches"),
    "no type": (
        lambda f: first(f, record(0, KIND, POSITION, without="particle_type")),
        "train.tfrecord: record 0: feature 'particle_type' is missing (existing: key, position, step_context)",
    ),
    "no position": (
        lambda f: first(f, record(0, KIND, POSITION, without="position")),
        "train.tfrecord: record 0: feature 'position' is missing (existing: key, particle_type, step_context)",
    ),
    "a frame too few": (
        lambda f: first(f, record(0, KIND, POSITION[1:])),
        "record 0: feature 'particle_type' has 56 bytes and 'position' 420",
    ),
    "no protobuf": (lambda f: first(f, b"\xff" * 9), "train.tfrecord: record 0: not a tf.train.SequenceExample"),
    "no bounds": (lambda f: without(f / "metadata.json", "bounds"), "metadata.json: key 'bounds' (low and high corner"),
    "no dt": (lambda f: without(f / "metadata.json", "dt"), "metadata.json: key 'dt' (time from frame to frame) is"),
    "no length": (lambda f: without(f / "metadata.json", "sequence_length"), "metadata.json: key 'sequence_length'"),
    "2-D": (
        lambda f: (f / "metadata.json").write_text(json.dumps(METADATA | {"bounds": [[0, 1], [0, 1]]})),
        "metadata.json: key 'bounds' has shape (2, 2), expected (3, 2)",
    ),
    "no JSON": (lambda f: (f / "metadata.json").write_text("{"), "metadata.json: not JSON"),
    "no metadata": (lambda f: (f / "metadata.json").unlink(), "metadata.json: no such file; --download fetches"),
}


@needs_records
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_gives_one_line(gns, gns_folder, kind):
    damage, message = DAMAGE[kind]
    damage(gns_folder)

    def read_all():
        content, _ = gns.find(gns_folder, (99,) * 3, whole=True)
        for k in range(len(content.locations)):
            list(content(k))

    with pytest.raises(Failure) as caught:
        read_all()
    assert message in str(caught.value)
    assert str(gns_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_records
def test_damaged_input_writes_nothing(gns_folder, tmp_path):
    """A worker finds it after other trajectories were written: one line, exit code 2, no file."""
    flip(gns_folder / "test.tfrecord", 300)
    done = run("--source", gns_folder, "--scale", "full", "--out", tmp_path / "a.h5", "--workers", 1)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {gns_folder / 'test.tfrecord'}: record 0: wrong checksum")
    assert not (tmp_path / "a.h5").exists()
    assert not (tmp_path / "a.h5.manifest.json").exists()


def test_damage_of_the_hdf5_form(gns, hdf5_folder):
    with h5py.File(hdf5_folder / "valid.h5", "a") as file:
        del file["00001/position"]
    (hdf5_folder / "test.h5").write_bytes(b"no HDF5")
    with pytest.raises(Failure, match=r"test\.h5: not a readable HDF5 file"):
        gns.find(hdf5_folder, (5, 2, 1), whole=True)
    with h5py.File(hdf5_folder / "test.h5", "w") as file:
        file["00000"] = np.zeros(3)
    content, _ = gns.find(hdf5_folder, (5, 2, 1), whole=True)
    messages = {6: r"valid\.h5: group 00001: dataset 'position'", 7: "group 00000: dataset 'particle_type'"}
    for number, message in messages.items():
        with pytest.raises(Failure, match=message):
            list(content(number))


def test_a_source_must_be_named(water3d, tmp_path):
    out = ["--out", str(tmp_path / "a.h5")]
    for options, message in (
        ([], "--scale small: give the folder of GNS' files: --source DIR, or --source splishsplash"),
        (["--scale", "tiny", "--download"], "--scale tiny: give the folder of GNS' files: --source DIR;"),
        (["--download", "--source", "splishsplash"], "--scale small: give the folder of GNS' files: --source DIR;"),
        (["--source", str(tmp_path / "absent")], "absent/metadata.json: no such file"),
    ):
        with pytest.raises(Failure) as caught:
            water3d.run([*out, *options])
        assert message in str(caught.value)
