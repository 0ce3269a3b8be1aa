"""`distegnn launch` without other hosts: the hosts file, the checks of hosts, agents on this machine."""

from __future__ import annotations

import json
import os
import queue
import re
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
from dist_egnn.launch import agent_client, host_checks, host_info, hostfile
from dist_egnn.launch.agent_client import AgentClient
from dist_egnn.launch.workers import WorkerFailure, Workers

PATIENCE_S = 60.0


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
    ("text", "message"),
    [
        ("node1 trainer=2", "line 1: 'trainer=2'; use port=N"),
        ("node1\nnode2 trainers=two", "line 2: trainers=two"),
        ("node1 port=0", "port=0"),
        ("node1\nnode1", "node1 twice"),
        ("# none", "no host"),
        ("-oProxyCommand=x", "'-oProxyCommand=x'"),
    ],
)
def test_mistakes_in_a_hosts_file(text, message, tmp_path):
    with pytest.raises(Failure, match=rf"hosts\.txt.*{message}"):
        hosts_of(text, tmp_path)
    with pytest.raises(Failure, match=r"none\.txt"):
        hostfile.read_hosts(tmp_path / "none.txt")


def test_a_command_keeps_folder_and_python_path(tmp_path, monkeypatch):
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", "/some where")
    code = "import os; print(os.getcwd(), os.environ['PYTHONPATH'], sep='|')"
    done = subprocess.run(
        hostfile.LOCALHOST.command(sys.executable, "-c", code), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{folder}|/some where"


def test_hosts_of_a_slurm_job(tmp_path, monkeypatch):
    fake = tmp_path / "scontrol"
    fake.write_text('#!/bin/sh\n[ "$3" = "n[1-2]" ] && printf "n1\\nn2\\n"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    hosts = hostfile.slurm_hosts()
    assert [host.name for host in hosts] == ["n1", "n2"]
    srun = "srun --overlap --nodes=1 --ntasks=1 --unbuffered --nodelist=n2"
    assert hosts[1].command("python")[:6] == srun.split()
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    with pytest.raises(Failure, match="no hosts"):
        hostfile.slurm_hosts()


INFO = {
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


def info(**changed: Any) -> dict[str, Any]:
    store = changed.pop("store", {})
    return {**INFO, **changed, "store": {**INFO["store"], **store} if store is not None else None}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, None),
        ({"versions": {**INFO["versions"], "dgl": "2.1.0"}}, "host b: has dgl 2.1.0, the launcher 1.1.3"),
        ({"code": "?"}, "host b: has other code"),
        ({"store": None}, "host b: has no whole store"),
        ({"store": {"sha256": "b"}}, "host b: store is another store there than on a"),
        ({"shared": 1e4}, "host b: its server takes about"),
        ({"memory": 1e8}, "host b: server and trainers take about"),
    ],
)
def test_problems_of_hosts(other, message):
    config = configs.load(None, ["data.path=store", "run.dir=runs/x"])
    hosts = [hostfile.Host(name, ()) for name in "ab"]
    problems = host_checks.find_problems(hosts, [info(), info(**other)], config, resume=False)
    if message is None:
        assert not problems
        assert host_checks.find_problems(hosts, [info(), info()], config, resume=True)  # nothing to resume
        assert (
            "holds a run already"
            in host_checks.find_problems(hosts, [info(has_run=True), info()], config, resume=False)[0]
        )
    else:
        assert len(problems) == 1
        assert message in problems[0]


@pytest.mark.parametrize(
    ("trainers", "store", "message"),
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
def test_a_store_made_for_other_hosts(trainers, store, message):
    config = configs.load(None, ["data.path=store", "run.dir=runs/x"])
    hosts = [hostfile.Host(name, (), trainers=n) for name, n in zip("ab", trainers, strict=True)]
    problems = host_checks.find_problems(hosts, [info(store=store), info(store=store)], config, resume=False)
    assert not problems if message is None else message in problems[0]


def test_choice_of_the_interface():
    host = hostfile.Host("a", ())
    assert host_checks.choose_interface(host, info()) == ("eth0", "10.0.0.1")
    assert host_checks.choose_interface(replace(host, interface="lo"), info()) == ("lo", "127.0.0.1")
    with pytest.raises(Failure, match=r"interface=NAME.*eth0 \(10.0.0.1\), ib0 \(10.1.0.1\)"):
        host_checks.choose_interface(host, info(addresses={"eth0": "10.0.0.1", "ib0": "10.1.0.1"}))
    with pytest.raises(Failure, match="has no interface ib9"):
        host_checks.choose_interface(replace(host, interface="ib9"), info())


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


def ends(pid: int) -> bool:
    """Wait for the end of a process, which may stay as a zombie."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_an_agent_forwards_output_and_stops_processes(agent, tmp_path):
    client = agent()
    start(client, "cat; printf no-end; exit 3")
    events = [client.events.get(timeout=PATIENCE_S)[1] for _ in range(3)]
    assert events == [{"name": "a", "line": "given"}, {"name": "a", "line": "no-end"}, {"name": "a", "exit": 3}]
    pid = start(client, "trap '' TERM; echo ready; while :; do sleep 0.1; done", shared=f"dist_egnn~{os.getpid()}~")
    left = Path(f"/dev/shm/dist_egnn~{os.getpid()}~x")
    left.touch()
    assert client.events.get(timeout=PATIENCE_S)[1]["line"] == "ready"
    client.send("stop", name="a", within=0.5)  # it ignores SIGTERM
    assert client.events.get(timeout=PATIENCE_S)[1] == {"name": "a", "exit": -signal.SIGKILL}
    assert ends(pid)
    assert not left.exists()


@pytest.mark.parametrize("how", ["closed", "killed", "silent"])
def test_processes_end_with_their_agent(how, agent, monkeypatch):
    if how == "silent":
        monkeypatch.setattr(agent_client, "PING_EVERY_S", 1000)
    client = agent(patience=4.0 if how == "silent" else PATIENCE_S)
    pid = start(client, "exec sleep 100")
    if how == "killed":
        os.kill(client.process.pid, signal.SIGKILL)
    elif how == "closed":
        client.close()
    assert ends(pid)
    assert client.events.get(timeout=PATIENCE_S)[1] == {"lost": True}


def test_a_port_in_use_and_a_connection(agent):
    client = agent()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Failure, match=rf"host localhost: port {port} of 127.0.0.1: .* process {os.getpid()} "):
            client.call("listen", address="127.0.0.1", ports=[0, port])
    client.call("close")
    (port,) = client.call("listen", address="127.0.0.1", ports=[0])["ports"]
    assert client.call("reach", targets=[["127.0.0.1", port]], limit=PATIENCE_S) == []
    client.call("close")
    missed = client.call("reach", targets=[["127.0.0.1", port]], limit=PATIENCE_S)
    assert missed == [f"127.0.0.1 port {port} (Connection refused)"]


def test_a_host_without_agent(tmp_path):
    host = hosts_of("node1", tmp_path, ssh="sh -c 'echo Permission denied >&2; exit 255'")[0]
    with pytest.raises(Failure, match=r"host node1: .*\(Permission denied\)"):
        AgentClient(host, queue.Queue(), 1.0).wait_for_greeting(PATIENCE_S)
    with pytest.raises(Failure, match="no-such-ssh"):
        AgentClient(hosts_of("node1", tmp_path, ssh="no-such-ssh")[0], queue.Queue(), 1.0)


@pytest.mark.parametrize(
    ("scripts", "kind", "message"),
    [
        (["sleep 100", "echo 'error: no room'; exit 2", "echo lost peer; exit 1"], Failure, "host localhost: no room"),
        (["sleep 100", "kill -9 $$", "echo lost peer; exit 1"], WorkerFailure, "trainer 1 ended (killed by signal 9)"),
        (["sleep 100", "exit 0", "echo lost peer; exit 1"], WorkerFailure, "trainer 2 ended (exit code 1, lost peer)"),
    ],
)
def test_the_cause_of_a_failure(scripts, kind, message, agent, capsys):
    client = agent()
    workers = Workers([client])
    for rank, script in enumerate(scripts):
        workers.start(0, f"trainer {rank}", ["sh", "-c", script])
    with pytest.raises(kind, match=re.escape(message)):
        list(workers.lines(servers=False))
    workers.stop(servers=False)
    assert not workers.running
    assert "localhost| lost peer" in capsys.readouterr().err


def test_a_store_is_summarized_without_torch(make_store):
    path = make_store(2)
    code = (
        "import json, sys; from pathlib import Path; from dist_egnn.launch import host_info; "
        "print(json.dumps(host_info.summarize_store(Path(sys.argv[1])))); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    store = json.loads(done.stdout)
    assert (store["machines"], store["trainers"], len(store["largest"])) == (2, 1, 2)
    assert store["sizes"][0] == sum(file.stat().st_size for file in path.glob("shard-*/part0/*"))
