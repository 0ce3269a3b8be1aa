"""What `distegnn launch` knows without other hosts: the file of hosts, checks, agents on this machine."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_egnn import config as configs
from dist_egnn.errors import Failure
from dist_egnn.launch import host_checks, host_info, hostfile
from dist_egnn.launch.agent_client import AgentClient
from dist_egnn.launch.workers import WorkerFailure, Workers

PATIENCE_S = 20.0


def hosts_of(text: str, folder: Path, ssh: str = "ssh") -> list[hostfile.Host]:
    (folder / "hosts.txt").write_text(text)
    return hostfile.read_hosts(folder / "hosts.txt", ssh)


def test_hosts_from_a_file(tmp_path):
    one, two = hosts_of(
        "# cluster\nme@node1 port=2222 trainers=2 interface=ib0\n\nnode2 python=/opt/py  # last\n", tmp_path
    )
    assert one.reach == ("ssh", "-p", "2222", "me@node1")
    assert (one.copy, one.trainers, one.interface, one.python) == ("ssh -p 2222", 2, "ib0", sys.executable)
    assert (two.name, two.trainers, two.interface, two.python) == ("node2", None, None, "/opt/py")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1 trainer=2", "line 1: 'trainer=2'; use port=N"),
        ("node1\nnode2 trainers=two", "line 2: trainers=two"),
        ("node1 port=0", "port=0"),
        ("node1\nnode1", "names node1 twice"),
        ("# none", "names no host"),
        ("-oProxyCommand=x", "is not a host name"),
    ],
)
def test_a_wrong_file_of_hosts(text, said, tmp_path):
    with pytest.raises(Failure, match=r"hosts\.txt") as caught:
        hosts_of(text, tmp_path)
    assert said in str(caught.value)


def test_no_file_of_hosts(tmp_path):
    with pytest.raises(Failure, match="readable file of hosts"):
        hostfile.read_hosts(tmp_path / "none.txt")


def test_the_command_keeps_folder_and_python(tmp_path, monkeypatch):
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", "/some where")
    host = hostfile.LOCALHOST
    code = "import os; print(os.getcwd(), os.environ['PYTHONPATH'], sep='|')"
    done = subprocess.run(host.command(sys.executable, "-c", code), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{folder}|/some where"


def test_hosts_of_a_slurm_job(tmp_path, monkeypatch):
    fake = tmp_path / "scontrol"
    fake.write_text('#!/bin/sh\n[ "$3" = "n[1-2]" ] && printf "n1\\nn2\\n"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = hostfile.slurm_hosts({"SLURM_JOB_NODELIST": "n[1-2]"})
    assert [host.name for host in found] == ["n1", "n2"]
    assert found[1].command("python")[:6] == [
        "srun",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        "--unbuffered",
        "--nodelist=n2",
    ]
    with pytest.raises(Failure, match="no hosts"):
        hostfile.slurm_hosts({})


SEEN = {
    "versions": host_info.package_versions(),
    "code": host_info.source_hash(),
    "addresses": {"lo": "127.0.0.1", "eth0": "10.0.0.1"},
    "memory": 1e12,
    "shared": 1e12,
    "has_run": False,
    "store": {
        "sha256": "a",
        "machines": 2,
        "trainers": 2,
        "shards": 1,
        "sizes": [10**6, 10**6],
        "largest": [[100, 1000]] * 4,
        "sums": [[200, 2000, 20]] * 2,
        "floats": 12,
    },
}


def seen(**changed: Any) -> dict[str, Any]:
    store = changed.pop("store", {})
    return {**SEEN, **changed, "store": {**SEEN["store"], **store} if store is not None else None}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, None),
        ({"versions": {**SEEN["versions"], "dgl": "2.1.0"}}, "host b: has dgl 2.1.0, the launcher 1.1.3"),
        ({"code": "?"}, "host b: has other code"),
        ({"store": None}, "host b: has no whole store"),
        ({"store": {"sha256": "b"}}, "host b: store is another store there than on a"),
        ({"shared": 1e4}, "host b: its server takes about"),
        ({"memory": 1e8}, "host b: server and trainers take about"),
    ],
)
def test_what_hosts_must_have(other, said):
    config = configs.load(None, ["data.path=store", "run.dir=runs/x"])
    hosts = [hostfile.Host(name, ()) for name in "ab"]
    found = host_checks.find_problems(hosts, [seen(), seen(**other)], config, resume=False)
    if said is None:
        assert not found
        assert host_checks.find_problems(hosts, [seen(), seen()], config, resume=True)  # nothing to go on with
        assert (
            "holds a run already"
            in host_checks.find_problems(hosts, [seen(has_run=True), seen()], config, resume=False)[0]
        )
    else:
        assert len(found) == 1
        assert said in found[0]


@pytest.mark.parametrize(
    ("trainers", "store", "said"),
    [
        ((2, 2), {}, None),
        ((None, None), {}, None),
        (
            (2, 2),
            {"machines": 4},
            "4 machines × 2 trainers; partition again with --parts 2 --trainers 2 --shard-nodes 0",
        ),
        ((1, 1), {}, "partition again with --parts 2 --trainers 1 --shard-nodes 0"),
        ((1, 2), {}, "different numbers of trainers"),
        ((None, None), {"shards": 3}, "3 graphs, and servers take one"),
    ],
)
def test_a_store_made_for_other_hosts(trainers, store, said):
    config = configs.load(None, ["data.path=store", "run.dir=runs/x"])
    hosts = [hostfile.Host(name, (), trainers=n) for name, n in zip("ab", trainers, strict=True)]
    found = host_checks.find_problems(hosts, [seen(store=store), seen(store=store)], config, resume=False)
    assert not found if said is None else said in found[0]


def test_the_interface_must_be_plain():
    host = hostfile.Host("a", ())
    assert host_checks.choose_interface(host, seen()) == ("eth0", "10.0.0.1")
    assert host_checks.choose_interface(replace(host, interface="lo"), seen()) == ("lo", "127.0.0.1")
    with pytest.raises(Failure, match=r"interface=NAME.*eth0 \(10.0.0.1\), ib0 \(10.1.0.1\)"):
        host_checks.choose_interface(host, seen(addresses={"eth0": "10.0.0.1", "ib0": "10.1.0.1"}))
    with pytest.raises(Failure, match="has no interface ib9"):
        host_checks.choose_interface(replace(host, interface="ib9"), seen())


@pytest.fixture
def agent() -> Iterator[Callable[..., AgentClient]]:
    """agent(patience=…): an agent on this machine, ended after the test."""
    clients: list[AgentClient] = []

    def start(patience: float = PATIENCE_S) -> AgentClient:
        clients.append(AgentClient(hostfile.LOCALHOST, queue.Queue(), patience))
        clients[-1].wait_for_greeting(PATIENCE_S)
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def start(client: AgentClient, script: str, name: str = "a", shared: str = "") -> int:
    return client.call("start", name=name, argv=["sh", "-c", script], env={}, text="given\n", shared=shared)["pid"]


def gone(pid: int, within: float = 10.0) -> bool:
    """Whether a process ends in that time."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_an_agent_passes_on_and_stops(agent, tmp_path):
    client = agent()
    start(client, "cat; printf no-end; exit 3")
    events = [client.events.get(timeout=5)[1] for _ in range(3)]
    assert events == [{"name": "a", "line": "given"}, {"name": "a", "line": "no-end"}, {"name": "a", "exit": 3}]
    pid = start(client, "trap '' TERM; echo ready; while :; do sleep 0.1; done", shared=f"dist_egnn~{os.getpid()}~")
    left = Path(f"/dev/shm/dist_egnn~{os.getpid()}~x")
    left.touch()
    assert client.events.get(timeout=5)[1]["line"] == "ready"
    client.send("stop", names=["a"], within=0.5)  # does not heed SIGTERM
    assert client.events.get(timeout=5)[1] == {"name": "a", "exit": -signal.SIGKILL}
    assert gone(pid)
    assert not left.exists()


@pytest.mark.parametrize("how", ["closed", "killed", "silent"])
def test_what_an_agent_started_ends_with_it(how, agent):
    client = agent(patience=1.0 if how == "silent" else PATIENCE_S)
    pid = start(client, "exec sleep 100")
    if how == "killed":
        os.kill(client.process.pid, signal.SIGKILL)
    elif how == "closed":
        client.close()
    assert gone(pid)
    assert client.events.get(timeout=5)[1] == {"lost": True}


def test_a_taken_port_is_named(agent):
    client = agent()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            Failure, match=rf"host localhost: port {port} of 127.0.0.1: .* in use; used by process {os.getpid()} "
        ):
            client.call("listen", address="127.0.0.1", ports=[0, port])
    client.call("close")
    (port,) = client.call("listen", address="127.0.0.1", ports=[0])["ports"]
    assert client.call("reach", targets=[["127.0.0.1", port]], limit=1.0) == []
    client.call("close")
    assert client.call("reach", targets=[["127.0.0.1", port]], limit=1.0) == [
        f"127.0.0.1 port {port} (Connection refused)"
    ]


def test_no_agent(tmp_path):
    host = hosts_of("node1", tmp_path, ssh="sh -c 'echo Permission denied >&2; exit 255'")[0]
    with pytest.raises(Failure, match=r"host node1: no agent answers \(Permission denied\)"):
        AgentClient(host, queue.Queue(), 1.0).wait_for_greeting(5)
    with pytest.raises(Failure, match="no-such-ssh does not start"):
        AgentClient(hosts_of("node1", tmp_path, ssh="no-such-ssh")[0], queue.Queue(), 1.0)


@pytest.mark.parametrize(
    ("scripts", "kind", "said"),
    [
        (["sleep 100", "echo 'error: no room'; exit 2", "echo lost peer; exit 1"], Failure, "host localhost: no room"),
        (["sleep 100", "kill -9 $$", "echo lost peer; exit 1"], WorkerFailure, "trainer 1 ended (killed by signal 9)"),
        (["sleep 100", "exit 0", "echo lost peer; exit 1"], WorkerFailure, "trainer 2 ended (exit code 1, lost peer)"),
    ],
)
def test_who_is_to_blame(scripts, kind, said, agent, capsys):
    client = agent()
    workers = Workers([client], lambda: False)
    for rank, script in enumerate(scripts):
        workers.start(0, f"trainer {rank}", ["sh", "-c", script])
    with pytest.raises(kind) as caught:
        list(workers.lines(servers=False))
    assert said in str(caught.value)
    workers.stop(servers=False)
    assert not workers.running
    assert "localhost| lost peer" in capsys.readouterr().err


def test_a_store_is_looked_at_without_torch(make_store):
    path = make_store(2)
    code = (
        "import json, sys; from pathlib import Path; from dist_egnn.launch import host_info; "
        "print(json.dumps(host_info.summarize_store(Path(sys.argv[1])))); assert 'torch' not in sys.modules"
    )
    found = json.loads(
        subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    )
    assert (found["machines"], found["trainers"], len(found["largest"])) == (2, 1, 2)
    assert found["sizes"][0] == sum(file.stat().st_size for file in path.glob("shard-*/part0/*"))
