"""recipes/water3d: GNS' files read, fetched and refused; the stand-in.

The TFRecord files are written here byte by byte, by the format's description, with nothing of the recipe's reader.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from dist_egnn import config
from dist_egnn.errors import Failure
from dist_egnn.trajectories import SampleSpec, Snapshot, Trajectories, node_fields

RECIPE = Path(__file__).parents[2] / "recipes" / "water3d"
METADATA = {
    "bounds": [[0.1, 0.9], [0.2, 0.8], [0.0, 1.0]],
    "sequence_length": 5,
    "default_connectivity_radius": 0.035,
    "dim": 3,
    "dt": 0.005,
}
SIZES = {"train": (7, 9, 8, 6, 5), "valid": (6, 4), "test": (10,)}
needs_records = pytest.mark.skipif(
    importlib.util.find_spec("google_crc32c") is None, reason="google-crc32c is not installed (extra water3d)"
)


# --- an independent writer -------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """Bit by bit, by the polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) % 2**32 + 0xA282EAD8) % 2**32)


def framed(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + masked(payload)


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number % 128 + 128]), number // 128
    return out + bytes([number])


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(context: dict[str, bytes], lists: dict[str, list[bytes]]) -> bytes:
    """A tf.train.SequenceExample; values are encoded features."""
    first = b"".join(field(1, field(1, k.encode()) + field(2, v)) for k, v in context.items())
    second = b"".join(
        field(1, field(1, k.encode()) + field(2, b"".join(field(1, v) for v in steps))) for k, steps in lists.items()
    )
    return field(1, first) + field(2, second)


def of_bytes(content: bytes) -> bytes:
    return field(1, field(1, content))


def record(number: int, kind: np.ndarray, position: np.ndarray, *, without: str = "") -> bytes:
    context = {"key": field(3, field(1, varint(number))), "particle_type": of_bytes(kind.astype("<i8").tobytes())}
    steps = {"position": [of_bytes(x.astype("<f4").tobytes()) for x in position]}
    steps["step_context"] = [of_bytes(struct.pack("<f", t)) for t in range(len(position))]
    for content in (context, steps):
        content.pop(without, None)
    return example(context, steps)


def trajectories() -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    draw = np.random.default_rng(3)
    frames = METADATA["sequence_length"] + 1
    return {
        split: [(draw.integers(3, 7, n), draw.uniform(0.2, 0.8, (frames, n, 3)).astype("f4")) for n in sizes]
        for split, sizes in SIZES.items()
    }


@pytest.fixture
def gns_folder(tmp_path):
    """A folder as GNS publishes it."""
    folder = tmp_path / "Water-3D"
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps(METADATA))
    for split, content in trajectories().items():
        payloads = [record(k, *arrays) for k, arrays in enumerate(content)]
        (folder / f"{split}.tfrecord").write_bytes(b"".join(framed(p) for p in payloads))
    return folder


@pytest.fixture
def hdf5_folder(tmp_path):
    folder = tmp_path / "hdf5"
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps({k: METADATA[k] for k in ("bounds", "dt")}))
    for split, content in trajectories().items():
        with h5py.File(folder / f"{split}.h5", "w") as file:
            for k, (kind, position) in enumerate(content):
                file[f"{k:05d}/particle_type"], file[f"{k:05d}/position"] = kind, position
    return folder


# --- running the recipe ----------------------------------------------------------------------------------------------


def loaded(monkeypatch, name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gns(monkeypatch):
    """recipes/water3d/gns.py as a module."""
    return loaded(monkeypatch, "gns", RECIPE / "gns.py")


@pytest.fixture
def prepare(gns, monkeypatch):
    """recipes/water3d/prepare.py as a module; in this process, with threads as workers."""
    module = loaded(monkeypatch, "water3d_prepare", RECIPE / "prepare.py")
    monkeypatch.setattr(module.preparing, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers))
    return module


def command(*options):
    return [sys.executable, str(RECIPE / "prepare.py"), *map(str, options)]


def run(*options):
    return subprocess.run(command(*options), capture_output=True, text=True, timeout=120)


def same(path: Path, counts: tuple[int, int, int]) -> None:
    """The file holds what trajectories() says, ``counts`` of each split."""
    data = Trajectories(path)
    wanted = [
        (split, *arrays) for (split, all_), n in zip(trajectories().items(), counts, strict=True) for arrays in all_[:n]
    ]
    assert len(data) == len(wanted)
    for k, (split, kind, position) in enumerate(wanted):
        assert data[k].split == split
        assert data[k].dt == METADATA["dt"]
        assert data[k].source.startswith(f"GNS Water-3D, {split}")
        assert data[k].frames == len(position)
        for t, x in enumerate(position):
            np.testing.assert_array_equal(data.position(k, t), x)
        np.testing.assert_array_equal(data.attribute(k, "type"), kind)
        np.testing.assert_array_equal(data.box(k), np.array(METADATA["bounds"], "f4").T)


@needs_records
def test_tfrecords_are_read_as_written(gns_folder, prepare, tmp_path):
    """All of them at full scale, 4 + 1 + 1 at tiny; the same bytes by processes and by threads."""
    a, b, c = (tmp_path / f"{name}.h5" for name in "abc")
    done = run("--source", gns_folder, "--scale", "full", "--out", a, "--workers", 2)
    assert done.returncode == 0, done.stderr
    prepare.run(["--source", str(gns_folder), "--scale", "full", "--out", str(b), "--workers", "1"])
    prepare.run(["--source", str(gns_folder), "--scale", "tiny", "--out", str(c)])
    same(a, (5, 2, 1))
    same(c, (4, 1, 1))
    assert a.read_bytes() == b.read_bytes()
    manifest = json.loads((tmp_path / "a.h5.manifest.json").read_text())
    assert manifest["sha256"] == hashlib.sha256(a.read_bytes()).hexdigest()


def test_hdf5_form_is_read_as_written(hdf5_folder, prepare, tmp_path):
    prepare.run(["--source", str(hdf5_folder), "--scale", "full", "--out", str(tmp_path / "a.h5")])
    same(tmp_path / "a.h5", (5, 2, 1))


@needs_records
def test_its_samples_have_the_published_features(gns_folder, prepare, tmp_path):
    """‖v‖ and type/max type, no node attributes."""
    prepare.run(["--source", str(gns_folder), "--scale", "tiny", "--out", str(tmp_path / "a.h5")])
    told = config.load(RECIPE / "config.yaml").data
    spec = SampleSpec(told.radius, 2, tuple(told.features or ()), tuple(told.node_attributes))
    kind, position = trajectories()["train"][1]
    fields = node_fields(Trajectories(tmp_path / "a.h5"), Snapshot("train", 1, 3), spec)
    speed = np.linalg.norm(position[4] - position[3], axis=1)
    np.testing.assert_allclose(fields["f"], np.stack([speed, kind / kind.max()], 1), rtol=1e-6)
    assert fields["a"].shape == (9, 0)


def test_killed_and_resumed_gives_the_same_bytes(hdf5_folder, prepare, tmp_path):
    """Killed once the first trajectory is there; trajectories long enough to be in time."""
    draw = np.random.default_rng(0)
    with h5py.File(hdf5_folder / "train.h5", "w") as file:
        for k in range(24):
            file[f"{k:05d}/particle_type"] = np.full(2000, 5)
            file[f"{k:05d}/position"] = draw.uniform(size=(40, 2000, 3)).astype("f4")
    whole, killed, parts = (tmp_path / name for name in ("whole.h5", "killed.h5", "killed.h5.parts"))
    options = ("--source", str(hdf5_folder), "--scale", "full", "--workers", "1", "--out")
    process = subprocess.Popen(command(*options, killed), start_new_session=True, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(parts.glob("0*.h5")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    process.wait()
    while time.monotonic() < until:  # its workers notice, and leave nothing in /dev/shm
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("workers outlive the process that was killed")
    assert list(parts.glob("0*.h5"))
    assert not killed.exists()
    prepare.run([*options, str(killed)])
    prepare.run([*options, str(whole)])
    assert killed.read_bytes() == whole.read_bytes()
    assert not parts.exists()


# --- what is damaged or missing --------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def without(path: Path, key: str) -> None:
    path.write_text(json.dumps({k: v for k, v in METADATA.items() if k != key}))


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
        "train.tfrecord: record 0: feature 'particle_type' is missing (it has: key, position, step_context)",
    ),
    "no position": (
        lambda f: first(f, record(0, KIND, POSITION, without="position")),
        "train.tfrecord: record 0: feature 'position' is missing (it has: key, particle_type, step_context)",
    ),
    "a frame too few": (
        lambda f: first(f, record(0, KIND, POSITION[1:])),
        "record 0: feature 'particle_type' has 56 bytes and 'position' 420: no int64 (N,) and float32 (6, N, 3)",
    ),
    "no protobuf": (lambda f: first(f, b"\xff" * 9), "train.tfrecord: record 0: no tf.train.SequenceExample"),
    "no bounds": (lambda f: without(f / "metadata.json", "bounds"), "metadata.json: key 'bounds' (low and high corner"),
    "no dt": (lambda f: without(f / "metadata.json", "dt"), "metadata.json: key 'dt' (time from frame to frame) is"),
    "no length": (lambda f: without(f / "metadata.json", "sequence_length"), "metadata.json: key 'sequence_length'"),
    "2-D": (
        lambda f: (f / "metadata.json").write_text(json.dumps(METADATA | {"bounds": [[0, 1], [0, 1]]})),
        "metadata.json: key 'bounds' has shape (2, 2), expected (3, 2)",
    ),
    "no JSON": (lambda f: (f / "metadata.json").write_text("{"), "metadata.json: no JSON"),
    "no metadata": (lambda f: (f / "metadata.json").unlink(), "metadata.json: no such file; --download fetches"),
}


@needs_records
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_line(gns, gns_folder, kind):
    damage, says = DAMAGE[kind]
    damage(gns_folder)

    def read_all():
        found, _ = gns.find(gns_folder, (99,) * 3, whole=True)
        for k in range(len(found.places)):
            list(found(k))

    with pytest.raises(Failure) as caught:
        read_all()
    assert says in str(caught.value)
    assert str(gns_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_records
def test_nothing_stands_where_the_input_is_damaged(gns_folder, tmp_path):
    """Found by a worker, after other trajectories were written: one line, exit code 2, no file."""
    flip(gns_folder / "test.tfrecord", 300)
    done = run("--source", gns_folder, "--scale", "full", "--out", tmp_path / "a.h5", "--workers", 1)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    told = "record 0: wrong checksum; the file is damaged, fetch it again"
    assert line == f"error: {gns_folder / 'test.tfrecord'}: {told}"
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
    found, _ = gns.find(hdf5_folder, (5, 2, 1), whole=True)
    for number, says in (
        (6, r"valid\.h5: group 00001: dataset 'position'"),
        (7, "group 00000: dataset 'particle_type'"),
    ):
        with pytest.raises(Failure, match=says):
            list(found(number))


def test_a_source_must_be_named(prepare, tmp_path):
    out = ["--out", str(tmp_path / "a.h5")]
    for options, says in (
        ([], "--scale small: name the folder of GNS' files: --source DIR, or --source splishsplash"),
        (["--scale", "tiny", "--download"], "--scale tiny: name the folder of GNS' files: --source DIR;"),
        (["--download", "--source", "splishsplash"], "--scale small: name the folder of GNS' files: --source DIR;"),
        (["--source", str(tmp_path / "absent")], "absent/metadata.json: no such file"),
    ):
        with pytest.raises(Failure) as caught:
            prepare.run([*out, *options])
        assert says in str(caught.value)


# --- fetching --------------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Gives ranges and hashes as the bucket does. Its faults are set by the tests."""

    folder: Path
    stops_after: int | None = None
    wrong_hash = ranges = True
    hash_kind = "md5"
    asked: list[tuple[str, int]]

    def log_message(self, *_):
        pass

    def _head(self) -> bytes:
        path = self.folder / Path(self.path).name
        if not path.exists():
            self.send_error(404)
            return b""
        data = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].rstrip("-")) if self.ranges else 0
        ranged = start or "Range" in self.headers
        self.asked.append((f"{self.command} {path.name}", start))
        self.send_response(206 if ranged and self.ranges else 200)
        self.send_header("Content-Length", str(len(data) - start))
        digests = {"crc32c": struct.pack(">I", crc32c(data)), "md5": hashlib.md5(data).digest()}
        if self.hash_kind == "crc32c":
            del digests["md5"]
        for kind, digest in digests.items():
            self.send_header(
                "x-goog-hash", f"{kind}={base64.b64encode(digest[::-1] if self.wrong_hash else digest).decode()}"
            )
        self.end_headers()
        return data[start:]

    def do_HEAD(self):
        self._head()

    def do_GET(self):
        data = self._head()
        self.wfile.write(data[: self.stops_after])


@pytest.fixture
def server(gns, gns_folder, monkeypatch):
    """The bucket on this machine; its files are those of gns_folder."""
    fresh = {
        "folder": gns_folder,
        "stops_after": None,
        "wrong_hash": False,
        "ranges": True,
        "hash_kind": "md5",
        "asked": [],
    }
    handler = type("Handler", (Server,), fresh)
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(gns, "URL", f"http://127.0.0.1:{service.server_port}")
    yield handler
    service.shutdown()
    service.server_close()


@needs_records
@pytest.mark.parametrize("kind", ["md5", "crc32c"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_fetch_goes_on_where_it_stopped(gns, server, gns_folder, tmp_path, kind, ranges):
    server.stops_after, server.hash_kind, server.ranges = 500, kind, ranges
    name, there = "train.tfrecord", tmp_path / "there"
    there.mkdir()
    with pytest.raises(Failure, match=r"ended after 500 of|cannot be fetched"):
        gns.fetch(there, name)
    assert [path.name for path in there.iterdir()] == [f"{name}.partial"]
    server.stops_after = None
    gns.fetch(there, name)
    assert (there / name).read_bytes() == (gns_folder / name).read_bytes()
    assert [path.name for path in there.iterdir()] == [name]
    assert server.asked[-1] == (f"GET {name}", 500 if ranges else 0)
    count = len(server.asked)
    gns.fetch(there, name)
    assert len(server.asked) == count, "a file that is there was asked for again"


@needs_records
@pytest.mark.parametrize("kind", ["md5", "crc32c"])
def test_a_wrong_hash_is_refused(gns, server, tmp_path, kind):
    server.wrong_hash, server.hash_kind = True, kind
    with pytest.raises(
        Failure, match=rf"valid\.tfrecord: what came disagrees with the server's {kind} and was removed"
    ):
        gns.fetch(tmp_path, "valid.tfrecord")
    assert not list(tmp_path.glob("valid*"))


@needs_records
def test_a_small_scale_fetches_no_more_than_it_needs(gns, server, gns_folder, tmp_path):
    """Records until there are enough; they can be read, but not at full scale."""
    (tmp_path / "metadata.json").write_bytes((gns_folder / "metadata.json").read_bytes())
    data = (gns_folder / "train.tfrecord").read_bytes()
    server.stops_after = len(data) - 100  # what a chunk of the real file would do: stop within the last record
    for name, limit in (("train.tfrecord", 4), ("valid.tfrecord", 1), ("test.tfrecord", 1)):
        gns.fetch(tmp_path, name, limit)
    asked = len(server.asked)
    gns.fetch(tmp_path, "train.tfrecord", 4)
    assert len(server.asked) == asked
    assert not (tmp_path / "train.tfrecord").exists()
    found, settings = gns.find(tmp_path, (4, 1, 1), whole=False)
    assert settings == gns.find(gns_folder, (4, 1, 1), whole=False)[1]
    for k, (kind, position) in enumerate(trajectories()["train"][:4]):
        (got,) = found(k)
        np.testing.assert_array_equal(got["position"], position)
        np.testing.assert_array_equal(got["attributes"]["type"], kind)
    with pytest.raises(Failure, match=r"train\.tfrecord: no such file"):
        gns.find(tmp_path, (99,) * 3, whole=True)


@needs_records
def test_no_network_is_one_clear_line(gns, prepare, tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(gns.urllib.request, "urlopen", offline)
    options = ["--source", str(tmp_path / "d"), "--download", "--scale", "tiny", "--out", str(tmp_path / "a.h5")]
    assert prepare.preparing.main(prepare.run, options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: {gns.URL}/metadata.json: cannot be fetched (<urlopen error Name or service not known>)"
    )
    assert "--source splishsplash needs none" in line
    assert not list((tmp_path / "d").iterdir())
    assert not (tmp_path / "a.h5").exists()


@needs_records
def test_a_missing_object_is_named(gns, server, gns_folder, tmp_path):
    (gns_folder / "test.tfrecord").unlink()
    with pytest.raises(Failure, match=r"/test\.tfrecord: cannot be fetched \(HTTP Error 404"):
        gns.fetch(tmp_path, "test.tfrecord")


# --- the stand-in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1000, 8000])
def test_scenes_fit_their_box(prepare, particles):
    scenes = [prepare.scene(0, k, particles) for k in range(300)]
    for drawn in scenes:
        box, block = np.array(drawn["box"]), np.array(drawn["block"])
        assert (block[0] >= box[0]).all()
        assert (block[1] <= box[1]).all()
        count = np.rint((block[1] - block[0]) / (2 * prepare.RADIUS) - 1).prod()
        assert abs(count / particles - 1) < 0.2
    assert scenes[0] == prepare.scene(0, 0, particles) != prepare.scene(1, 0, particles)


@pytest.mark.skipif(
    importlib.util.find_spec("pysplishsplash") is None, reason="pysplishsplash is not installed (extra fluid)"
)
def test_stand_in_falls_stays_in_its_box_and_repeats(tmp_path):
    for name, workers in (("a", 2), ("b", 1)):
        done = run("--scale", "tiny", "--out", tmp_path / f"{name}.h5", "--seed", 5, "--workers", workers)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    data = Trajectories(tmp_path / "a.h5")
    assert [trajectory.split for trajectory in data] == ["train"] * 4 + ["valid", "test"]
    for k, trajectory in enumerate(data):
        assert trajectory.source.startswith("stand-in for GNS Water-3D: SPlisHSPlasH")
        x = np.stack([data.position(k, t) for t in range(trajectory.frames)]).astype(float)
        low, high = data.box(k)
        assert (x >= low).all()
        assert (x <= high).all()
        assert (data.attribute(k, "type") == 5).all()
        v = np.diff(x, axis=0) / trajectory.dt
        height = (x[1:, :, 1] + x[:-1, :, 1]) / 2 - low[1]
        energy = ((v**2).sum(2) / 2 + 9.81 * height).mean(1)
        assert np.diff(energy).max() < 1e-3 * energy[0]
        assert energy[-1] < 0.9 * energy[0]


def test_without_the_engine_it_says_what_to_install(prepare, monkeypatch, tmp_path):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Failure, match=r"'pysplishsplash' is not installed; pip install -e '\.\[fluid\]'"):
        prepare.run(["--scale", "tiny", "--out", str(tmp_path / "a.h5")])
    (tmp_path / "train.tfrecord").touch()
    with pytest.raises(Failure, match=r"'google' is not installed; pip install -e '\.\[water3d\]'"):
        prepare.run(["--scale", "tiny", "--source", str(tmp_path), "--out", str(tmp_path / "a.h5")])


def test_config_has_the_published_values():
    told = config.load(RECIPE / "config.yaml")
    assert (told.data.radius, told.data.horizon, told.data.frames) == (0.035, 15, 15)
    assert (told.train.lr, told.train.weight_decay, told.train.batch_size, told.train.epochs) == (5e-4, 1e-12, 15, 2000)
    assert (told.loss.sigma, told.loss.mmd, told.loss.samples) == (1.5, 0.01, 3)
    assert (told.model.hidden, told.model.layers, told.model.virtual_nodes) == (64, 4, 3)
