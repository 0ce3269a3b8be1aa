"""`distegnn launch` without other hosts: the hosts file, the checks of hosts, agents on this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import GUARD_S, has_ended, wait_until
from small_data import DATA

from dist_egnn import config as configs
from dist_egnn.errors import Failure
from dist_egnn.launch import agent as agent_module
from dist_egnn.launch import agent_client, host_checks, host_info, hostfile
from dist_egnn.launch import main as launch_main
from dist_egnn.launch.agent_client import AgentClient
from dist_egnn.launch.workers import WorkerFailure, Workers

ROOT = Path(__file__).parents[2]


def hosts_of(text: str, folder: Path, ssh: str = "ssh") -> list[hostfile.Host]:
    (folder / "hosts.txt").write_text(text)
    return hostfile.read_hosts(folder / "hosts.txt", ssh)


def test_hosts_from_a_file(tmp_path):
    text = "# cluster\nme@node1 port=2222 trainers=2 interface=ib0\n\nnode2 python=/opt/py  # last\n"
    one, two = hosts_of(text, tmp_path)
    assert one.reach == ("ssh", "-p", "2222", "me@node1")
    assert (one.copy, one.trainers, one.interface, one.python) == ("ssh -p 2222", 2, "ib0", sys.executable)
    assert (two.name, two.trainers, two.interface, two.python) == ("node2", None, None, "/opt/py")
    program = tmp_path / "my ssh"
    program.touch(0o755)
    host = hosts_of("node1 'python=/a b/python'", tmp_path, str(program))[0]
    assert (host.reach, host.python) == ((str(program), "node1"), "/a b/python")
    assert hosts_of("node1 port=22", tmp_path, f"'{program}' -q")[0].reach == (str(program), "-q", "-p", "22", "node1")


MISTAKES = {"node1 trainer=2": "line 1: 'trainer=2'; use port=N", "node1\nnode2 trainers=two": "line 2: trainers=two"}
MISTAKES |= {"node1 port=0": "port=0", "node1\nnode1": "node1 twice", "# none": "no host", "-oProxy=x": "'-oProxy=x'"}


def test_mistakes_in_a_hosts_file(tmp_path, monkeypatch):
    for text, message in MISTAKES.items():
        with pytest.raises(Failure, match=rf"hosts\.txt.*{message}"):
            hosts_of(text, tmp_path)
    with pytest.raises(Failure, match=r"none\.txt"):
        hostfile.read_hosts(tmp_path / "none.txt")
    with pytest.raises(Failure, match=r"--ssh: .*quotation"):
        hosts_of("node1", tmp_path, "ssh 'a")
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(Failure, match="--hosts FILE"):
        hostfile.select_hosts(None, local=False, ssh=None)


def test_a_command_keeps_folder_and_python_path(tmp_path, monkeypatch):
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", "/some where")
    code = "import os; print(os.getcwd(), os.environ['PYTHONPATH'], sep='|')"
    printed = subprocess.check_output(hostfile.LOCALHOST.command(sys.executable, "-c", code), text=True)
    assert printed == f"{folder}|/some where\n"


def test_the_plan_reaches_no_host(make_store, tmp_path, capsys):
    """A program that would reach a host fails the test; ranks 0, 1 are on the first machine, 2, 3 on the second."""
    path = make_store(2, trainers=2, shard_nodes=0)
    given = [f"data.{key}={value}".replace("'", "") for key, value in DATA.items()]
    config = configs.load(None, [*given, f"data.path={path}", "run.dir=runs/x"])
    options: dict[str, Any] = {"resume": False, "max_restarts": 3, "dry_run": False, "dispatch": False, "plan": True}
    assert launch_main.run(config, hosts_of("a\nb interface=ib0", tmp_path, "no-such-ssh"), port=29700, **options) == {}
    printed = capsys.readouterr().out
    assert re.search(r"a +\(its own\) +a:29700 +0 to 1 ", printed)
    assert re.search(r"b +ib0 +b:29700 +2 to 3 ", printed)
    assert "rendezvous: a:29701; run: runs/x on a" in printed
    with pytest.raises(Failure, match=r"made for 2 machines × 2 trainers; .*--parts 1 --trainers 2 .*--shard-nodes 0"):
        launch_main.run(config, hosts_of("a", tmp_path, "no-such-ssh"), port=0, **options)


def test_dgl_2_has_no_servers_that_outlive_trainers(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"dgl": "2.1.0"}[name])
    options = {"resume": False, "max_restarts": 0, "dry_run": False, "dispatch": False, "plan": False}
    with pytest.raises(Failure, match=r"dgl 2\.1\.0: .* Python 3\.11 with dgl==1\.1\.3"):
        launch_main.run(configs.load(None, ["data.path=store"]), [], port=0, **options)


def caught_signals(pid: int) -> set[int]:
    """The signals for which a process has a handler."""
    (mask,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return {number + 1 for number in range(64) if int(mask, 16) >> number & 1}


@pytest.mark.parametrize(("code", "resumed"), [(75, False), (75, True), (0, False), (2, True)])
def test_sbatch_script_of_the_page(tmp_path, code, resumed):
    """SIGTERM reaches the launch, whose exit code decides whether the job is requeued; a run that exists is resumed."""
    (script,) = re.findall(r"```bash\n(#!.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.S)
    (tmp_path / "bin").mkdir()
    for name, text in {
        "distegnn": f'trap "echo saved >> started; exit {code}" TERM; echo "$*" > started; while :; do sleep 0.05; done',
        "scontrol": 'echo "$*" > requeued',
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    if resumed:
        (tmp_path / "runs" / "fluid").mkdir(parents=True)
        (tmp_path / "runs" / "fluid" / "last.pt").touch()
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    job = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=env)
    started = tmp_path / "started"
    wait_until(lambda: started.exists() and started.read_text(), "the launch", job)
    wait_until(lambda: signal.SIGTERM in caught_signals(job.pid), "the script's trap", job)
    job.terminate()
    assert job.wait(GUARD_S) == code
    words, saved = started.read_text().splitlines()
    fresh = "launch recipes/fluid113k/config.yaml data.path=store run.dir=runs/fluid"
    assert (words, saved) == ("launch --resume runs/fluid" if resumed else fresh, "saved")
    assert (tmp_path / "requeued").exists() == (code == 75)
    if code == 75:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"


STORE: dict[str, Any] = {"sha256": "a", "machines": 2, "trainers": 2, "shards": 1, "sizes": [10**6] * 2, "floats": 12}
STORE["inputs"] = {"source": "a.h5", "method": "metis", "method_seed": 0}
STORE |= {"largest": [[100, 1000]] * 4, "sums": [[200, 2000, 20]] * 2}
INFO = {"versions": host_info.package_versions(), "code": host_info.source_hash(), "memory": 1e12, "shared": 1e12}
INFO |= {"addresses": {"lo": "127.0.0.1", "eth0": "10.0.0.1"}, "has_run": False, "store": STORE}


def problems(changed: dict, *, both: bool = False, trainers: tuple = (None, None), resume: bool = False) -> list[str]:
    """Problems of hosts a and b, of which b, or both, report something else than INFO."""
    if changed.get("store"):
        changed = {**changed, "store": STORE | changed["store"]}
    hosts = [hostfile.Host(name, (), trainers=n) for name, n in zip("ab", trainers, strict=True)]
    config = configs.load(None, ["data.path=store", "run.dir=runs/x"])
    return host_checks.find_problems(hosts, [INFO | changed if both else INFO, INFO | changed], config, resume)


PROBLEMS: list[tuple[str, dict, dict]] = [
    ("host b: has dgl 0.9, the launcher ", {"versions": INFO["versions"] | {"dgl": "0.9"}}, {}),
    ("host b: has other code", {"code": "?"}, {}),
    ("host b: has no whole store", {"store": None}, {}),
    ("host b: store is another store there than on a", {"store": {"sha256": "b"}}, {}),
    ("host b: its server takes about", {"shared": 1e4}, {}),
    ("host b: server and trainers take about", {"memory": 1e8}, {}),
    ("host a: runs/x holds no run", {}, {"resume": True}),
    ("host a: runs/x holds a run already", {"has_run": True}, {"both": True}),
    ("made for 4 machines × 2", {"store": {"machines": 4}}, {"both": True, "trainers": (2, 2)}),
    (
        "--out store-2 --parts 2 --trainers 2 --method metis --seed 0 --shard-nodes 0",
        {"store": {"machines": 4}},
        {"both": True},
    ),
    ("--out store-2 --parts 2 --trainers 1 --method metis --seed 0 --shard-nodes 0", {}, {"trainers": (1, 1)}),
    ("different numbers of trainers", {}, {"trainers": (1, 2)}),
    ("3 graphs, and servers take one", {"store": {"shards": 3}}, {"both": True}),
]


def test_problems_of_hosts():
    assert not problems({}) + problems({}, trainers=(2, 2)) + problems({"has_run": True}, both=True, resume=True)
    for message, changed, options in PROBLEMS:
        (problem,) = problems(changed, **options)
        assert message in problem


def test_choice_of_the_interface():
    host = hostfile.Host("a", ())
    assert host_checks.choose_interface(host, INFO) == ("eth0", "10.0.0.1")
    assert host_checks.choose_interface(replace(host, interface="lo"), INFO) == ("lo", "127.0.0.1")
    with pytest.raises(Failure, match=r"interface=NAME.*eth0 \(10.0.0.1\), ib0 \(10.1.0.1\)"):
        host_checks.choose_interface(host, {"addresses": {"eth0": "10.0.0.1", "ib0": "10.1.0.1"}})
    with pytest.raises(Failure, match=r"no interface ib9.* interface=NAME"):
        host_checks.choose_interface(replace(host, interface="ib9"), INFO)


@pytest.fixture
def agent() -> Iterator[Callable[..., AgentClient]]:
    """agent(patience=…): an agent on this machine, ended after the test."""
    clients: list[AgentClient] = []

    def start(patience: float = GUARD_S) -> AgentClient:
        clients.append(AgentClient(hostfile.LOCALHOST, queue.Queue(), patience))
        clients[-1].wait_for_greeting(GUARD_S)
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def start(client: AgentClient, script: str, name: str = "a", shared: str = "") -> int:
    return client.call("start", name=name, argv=["sh", "-c", script], env={}, text="given\n", shared=shared)["pid"]


def test_an_agent_forwards_output_and_stops_processes(agent, tmp_path):
    client = agent()
    start(client, "cat; printf no-end; exit 3")
    events = [client.events.get(timeout=GUARD_S)[1] for _ in range(3)]
    assert events == [{"name": "a", "line": "given"}, {"name": "a", "line": "no-end"}, {"name": "a", "exit": 3}]
    pid = start(client, "trap '' TERM; echo ready; while :; do sleep 0.1; done", shared=f"dist_egnn~{os.getpid()}~")
    left = Path(f"/dev/shm/dist_egnn~{os.getpid()}~x")
    left.touch()
    assert client.events.get(timeout=GUARD_S)[1]["line"] == "ready"
    client.send("stop", name="a", within=0.5)  # it ignores SIGTERM
    assert client.events.get(timeout=GUARD_S)[1] == {"name": "a", "exit": -signal.SIGKILL}
    wait_until(lambda: has_ended(pid), "the end of the process")
    assert not left.exists()


@pytest.mark.parametrize("how", ["closed", "killed", "silent"])
def test_processes_end_with_their_agent(how, agent, monkeypatch):
    if how == "silent":
        monkeypatch.setattr(agent_client, "PING_EVERY_S", 1000)
    client = agent(patience=10.0 if how == "silent" else GUARD_S)
    pid = start(client, "exec sleep 100")
    if how == "killed":
        os.kill(client.process.pid, signal.SIGKILL)
    elif how == "closed":
        client.close()
    wait_until(lambda: has_ended(pid), "the end of the process")
    assert client.events.get(timeout=GUARD_S)[1] == {"lost": True}


def test_a_port_in_use_and_a_connection(agent):
    client = agent()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Failure, match=rf"host localhost: port {port} of 127.0.0.1: .* process {os.getpid()} "):
            client.call("listen", address="127.0.0.1", ports=[0, port])
    client.call("close")
    (port,) = client.call("listen", address="127.0.0.1", ports=[0])["ports"]
    assert client.call("reach", targets=[["127.0.0.1", port]], limit=GUARD_S) == []
    client.call("close")
    missed = client.call("reach", targets=[["127.0.0.1", port]], limit=GUARD_S)
    assert missed == [f"127.0.0.1 port {port} (Connection refused)"]


def test_a_host_without_agent(tmp_path):
    host = hosts_of("node1", tmp_path, ssh="sh -c 'echo Permission denied >&2; exit 255'")[0]
    with pytest.raises(Failure, match=r"host node1: .*\(Permission denied\)"):
        AgentClient(host, queue.Queue(), 1.0).wait_for_greeting(GUARD_S)
    with pytest.raises(Failure, match="no-such-ssh"):
        AgentClient(hosts_of("node1", tmp_path, ssh="no-such-ssh")[0], queue.Queue(), 1.0)


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("echo 'error: no room'; exit 2", Failure, "host localhost: no room"),
        ("kill -9 $$", WorkerFailure, "trainer 1 ended (killed by signal 9)"),
        ("exit 0", WorkerFailure, "trainer 2 ended (exit code 1, lost peer)"),
    ],
)
def test_the_cause_of_a_failure(script, kind, message, agent, capsys):
    workers = Workers([agent()])
    for rank, command in enumerate(["sleep 100", script, "echo lost peer; exit 1"]):
        workers.start(0, f"trainer {rank}", ["sh", "-c", command])
    with pytest.raises(kind, match=re.escape(message)):
        list(workers.lines(servers=False))
    workers.stop(servers=False)
    assert not workers.running
    assert "localhost| lost peer" in capsys.readouterr().err


def test_a_store_is_summarized_without_torch(make_store):
    path = make_store(2)
    code = "import json, sys; from pathlib import Path; from dist_egnn.launch import host_info; "
    code += "print(json.dumps(host_info.summarize_store(Path(sys.argv[1])))); assert 'torch' not in sys.modules"
    store = json.loads(subprocess.check_output([sys.executable, "-c", code, path]))
    assert (store["machines"], store["trainers"], len(store["largest"])) == (2, 1, 2)
    assert store["sizes"][0] == sum(file.stat().st_size for file in path.glob("shard-*/part0/*"))


def test_a_new_agent_removes_what_a_killed_one_left(agent, tmp_path, monkeypatch):
    """Files stand for a server's shared memory; those of another server stay."""
    old, names = agent(), ["dist_egnn~h~1~a", "dist_egnn~h~1~b", "dist_egnn~h~12~a"]
    file = Path(old.call("write", name="a", content="x"))
    old.process.kill()
    old.process.wait()
    agent().call("clear", folder=old.folder, shared=["dist_egnn~no server~"])
    assert not file.parent.exists()
    monkeypatch.setattr(agent_module, "SHARED_MEMORY", tmp_path)
    for name in names:
        (tmp_path / name).touch()
    agent_module.remove_shared("dist_egnn~h~1~")
    assert [left.name for left in tmp_path.iterdir()] == names[2:]
