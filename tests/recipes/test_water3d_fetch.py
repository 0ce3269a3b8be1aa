"""recipes/water3d: files of GNS are fetched from a local server."""

from __future__ import annotations

import base64
import hashlib
import http.server
import struct
import threading
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from gns_files import crc32c, needs_records, trajectories

from dist_egnn.errors import Failure


class Server(http.server.BaseHTTPRequestHandler):
    """Serves ranges and hashes as the bucket of GNS does; tests set its faults."""

    folder: Path
    stops_after: int | None = None
    wrong_hash = ranges = True
    hash_kind = "md5"
    requests: list[tuple[str, int]]

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
        self.requests.append((f"{self.command} {path.name}", start))
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
    """A local bucket with the files of gns_folder."""
    attributes = {"folder": gns_folder, "stops_after": None, "wrong_hash": False, "ranges": True, "hash_kind": "md5"}
    handler = type("Handler", (Server,), attributes | {"requests": []})
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(gns, "URL", f"http://127.0.0.1:{service.server_port}")
    yield handler
    service.shutdown()
    service.server_close()


@needs_records
@pytest.mark.parametrize("kind", ["md5", "crc32c"])
@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_fetch_continues(gns, server, gns_folder, tmp_path, kind, ranges):
    server.stops_after, server.hash_kind, server.ranges = 500, kind, ranges
    name, folder = "train.tfrecord", tmp_path / "fetched"
    folder.mkdir()
    with pytest.raises(Failure, match=r"ended after 500 of|cannot be fetched"):
        gns.fetch(folder, name)
    assert [path.name for path in folder.iterdir()] == [f"{name}.partial"]
    server.stops_after = None
    gns.fetch(folder, name)
    assert (folder / name).read_bytes() == (gns_folder / name).read_bytes()
    assert [path.name for path in folder.iterdir()] == [name]
    assert server.requests[-1] == (f"GET {name}", 500 if ranges else 0)
    count = len(server.requests)
    gns.fetch(folder, name)
    assert len(server.requests) == count, "a complete file was requested again"


@needs_records
@pytest.mark.parametrize("kind", ["md5", "crc32c"])
def test_a_wrong_hash_is_a_failure(gns, server, tmp_path, kind):
    server.wrong_hash, server.hash_kind = True, kind
    with pytest.raises(Failure, match=rf"valid\.tfrecord: .* {kind} .*run the command again"):
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
    requests = len(server.requests)
    gns.fetch(tmp_path, "train.tfrecord", 4)
    assert len(server.requests) == requests
    assert not (tmp_path / "train.tfrecord").exists()
    content, settings = gns.find(tmp_path, (4, 1, 1), whole=False)
    assert settings == gns.find(gns_folder, (4, 1, 1), whole=False)[1]
    for k, (kind, position) in enumerate(trajectories()["train"][:4]):
        (arguments,) = content(k)
        np.testing.assert_array_equal(arguments["position"], position)
        np.testing.assert_array_equal(arguments["attributes"]["type"], kind)
    with pytest.raises(Failure, match=r"train\.tfrecord: no such file"):
        gns.find(tmp_path, (99,) * 3, whole=True)


@needs_records
def test_no_network_is_one_line(gns, water3d, tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(gns.urllib.request, "urlopen", offline)
    options = ["--source", str(tmp_path / "d"), "--download", "--scale", "tiny", "--out", str(tmp_path / "a.h5")]
    assert water3d.preparation.main(water3d.run, options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {gns.URL}/metadata.json: cannot be fetched (")
    assert "--source splishsplash" in line
    assert not list((tmp_path / "d").iterdir())
    assert not (tmp_path / "a.h5").exists()


@needs_records
def test_a_missing_object_is_named(gns, server, gns_folder, tmp_path):
    (gns_folder / "test.tfrecord").unlink()
    with pytest.raises(Failure, match=r"/test\.tfrecord: cannot be fetched \(HTTP Error 404"):
        gns.fetch(tmp_path, "test.tfrecord")
