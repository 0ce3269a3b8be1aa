"""DGL's own graph server and client load a store. This file is also the script of both processes."""

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

LIMIT_S = 300.0
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


def shared_files() -> set[Path]:
    """Files of DGL's server in /dev/shm: graph, partition book, node fields. graph_server.py's start with dist_egnn~."""
    return {f for pattern in ("dist_egnn[!~]*", "dist_egnn", "node~_N~*-kvdata-") for f in SHARED.glob(pattern)}


@pytest.fixture
def alone() -> Iterator[None]:
    """One such server per machine: DGL names its files in /dev/shm after the fields alone."""
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
        "DGL_DIST_MAX_TRY_TIMES": "60",
    }
    before = shared_files()
    running = []
    until = time.monotonic() + LIMIT_S
    try:
        for kind in ("server", "client"):
            with open(tmp_path / f"{kind}.log", "w") as log:
                command = [sys.executable, __file__, kind, str(ip_config), str(result)]
                env = {**environment, "DGL_ROLE": kind}
                running.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        codes = [process.wait(max(until - time.monotonic(), 0.1)) for process in reversed(running)]
        logs = "".join((tmp_path / f"{kind}.log").read_text() for kind in ("server", "client"))
        assert codes == [0, 0], logs
        left = shared_files() - before
    finally:
        for process in running:
            process.kill()
            process.wait()
        for file in shared_files() - before:
            file.unlink()
    assert not left

    pulled = np.load(result)
    store = Store(path)
    graphs = [store.read(k, 0) for k in range(len(store.snapshots))]
    assert pulled["num_nodes"] == sum(g.num_nodes() for g in graphs)
    for name in ("x", "v", "f", "a", "y", "gid"):
        whole = np.concatenate([g.ndata[name] for g in graphs])
        np.testing.assert_array_equal(pulled[name], whole[pulled["nodes"]])
    snapshot = np.repeat(np.arange(len(graphs)), [g.num_nodes() for g in graphs])
    np.testing.assert_array_equal(pulled["snapshot"], snapshot[pulled["nodes"]])
    starts = np.cumsum([0, *(g.num_nodes() for g in graphs)])
    for k, name in enumerate(("src", "dst")):
        edges = [g.edges(order="eid")[k].numpy() + start for g, start in zip(graphs, starts, strict=False)]
        np.testing.assert_array_equal(pulled[name], np.concatenate(edges))


if __name__ == "__main__":
    role(*sys.argv[1:])
