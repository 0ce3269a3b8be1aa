"""DGL's own graph server and client take a store as it is. Run as a script, this file is either of them."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dist_egnn.data.store import Store

LIMIT_S = 40.0
SHARED = Path("/dev/shm")


def role(kind: str, ip_config: str, result: str) -> None:
    import dgl
    import torch

    # returns in the client only; tensorpipe: a server that lost its client idles instead of spinning
    dgl.distributed.initialize(ip_config, net_type="tensorpipe")
    assert kind == "client"
    graph = dgl.distributed.DistGraph("dist_egnn")
    nodes = torch.arange(0, graph.num_nodes(), 7).flip(0)
    src, dst = graph.find_edges(torch.arange(graph.num_edges()))
    pulled = {name: graph.ndata[name][nodes].numpy() for name in graph.ndata}
    np.savez(result, nodes=nodes, src=src, dst=dst, num_nodes=graph.num_nodes(), **pulled)
    dgl.distributed.exit_client()


def ours() -> set[Path]:
    """What DGL's server shares: its graph, its partition book, its node fields. Those of graph_server.py start with dist_egnn~,
    and may be another test's of this moment."""
    return {f for pattern in ("dist_egnn[!~]*", "dist_egnn", "node~_N~*-kvdata-") for f in SHARED.glob(pattern)}


@pytest.fixture
def alone() -> Iterator[None]:
    """One such server a machine: DGL names what it puts in /dev/shm after the fields alone."""
    with open("/tmp/dist_egnn-test-server.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="DGL's servers share graphs through /dev/shm")
def test_dgl_serves_a_store(make_store: Callable[..., Path], alone: None, tmp_path: Path) -> None:
    path = make_store(1, shard_nodes=0)
    ip_config, result = tmp_path / "ip.txt", tmp_path / "pulled.npz"
    ip_config.write_text(f"127.0.0.1 {free_port()}\n")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DGL_DIST_MODE": "distributed",
        "DGL_IP_CONFIG": str(ip_config),
        "DGL_CONF_PATH": str(path / "shard-00000" / "dist_egnn.json"),
        "DGL_GRAPH_FORMAT": "coo,csc",
        "DGL_SERVER_ID": "0",
        "DGL_NUM_SERVER": "1",
        "DGL_NUM_CLIENT": "1",
        "DGL_NUM_SAMPLER": "0",
        "DGL_DIST_MAX_TRY_TIMES": "8",
    }
    before = ours()
    running = []
    until = time.monotonic() + LIMIT_S
    try:
        for kind in ("server", "client"):
            with open(tmp_path / f"{kind}.log", "w") as log:
                command = [sys.executable, __file__, kind, str(ip_config), str(result)]
                running.append(
                    subprocess.Popen(
                        command, env={**environment, "DGL_ROLE": kind}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                    )
                )
        codes = [process.wait(max(until - time.monotonic(), 0.1)) for process in reversed(running)]
        logs = "".join((tmp_path / f"{kind}.log").read_text() for kind in ("server", "client"))
        assert codes == [0, 0], logs
        left = ours() - before
    finally:
        for process in running:
            process.kill()
            process.wait()
        for file in ours() - before:
            file.unlink()
    assert not left

    pulled = np.load(result)
    store = Store(path)
    pieces = [store.read(k, 0) for k in range(len(store.snapshots))]
    assert pulled["num_nodes"] == sum(g.num_nodes() for g in pieces)
    for name in ("x", "v", "f", "a", "y", "gid"):
        whole = np.concatenate([g.ndata[name] for g in pieces])
        np.testing.assert_array_equal(pulled[name], whole[pulled["nodes"]])
    snapshot = np.repeat(np.arange(len(pieces)), [g.num_nodes() for g in pieces])
    np.testing.assert_array_equal(pulled["snapshot"], snapshot[pulled["nodes"]])
    starts = np.cumsum([0, *(g.num_nodes() for g in pieces)])
    for k, name in enumerate(("src", "dst")):
        edges = [g.edges(order="eid")[k].numpy() + start for g, start in zip(pieces, starts, strict=False)]
        np.testing.assert_array_equal(pulled[name], np.concatenate(edges))


if __name__ == "__main__":
    role(*sys.argv[1:])
