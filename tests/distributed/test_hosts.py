"""Emulated hosts: what each host has of its own, the network between them, and that nothing is left when they end."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bridge
import pytest
from hosts import Failure, Hosts
from namespaces import members, network_of
from processes import GUARD_S, wait_until

TOOL = Path(__file__).parents[2] / "tools" / "emulated_hosts" / "hosts.py"
PYTHON = [sys.executable, "-S", "-c"]
ECHO = """if True:
    import socket, sys
    echo = socket.socket(type=socket.SOCK_DGRAM)
    echo.bind((sys.argv[1], 7000))
    print("ready", flush=True)
    while True:
        echo.sendto(*echo.recvfrom(2000))
"""
ASK = """if True:  # ADDRESS COUNT PATIENCE: sends numbers at once; prints the time to the first answer, and all answers
    import socket, sys, time
    ask = socket.socket(type=socket.SOCK_DGRAM)
    ask.settimeout(float(sys.argv[3]))
    start, took, back = time.monotonic(), 0, []
    for number in range(int(sys.argv[2])):
        ask.sendto(b"%d" % number, (sys.argv[1], 7000))
    try:
        while len(back) < int(sys.argv[2]):
            back.append(int(ask.recv(2000)))
            took = took or time.monotonic() - start
    except TimeoutError:
        pass
    print(took, *back)
"""


def echo(hosts: Hosts, name: str) -> None:
    server = hosts.run(name, [*PYTHON, ECHO, hosts.address(name)], stdout=subprocess.PIPE)
    with server.stdout as out:
        assert out.readline() == b"ready\n"


def ask(hosts: Hosts, source: str, target: str, count: int = 1, patience: float = GUARD_S) -> tuple[float, list[int]]:
    """Seconds until the first answer (0: none) and the answers. It ends after ``patience`` seconds without one."""
    words = [*PYTHON, ASK, hosts.address(target), str(count), str(patience)]
    client = hosts.run(source, words, stdout=subprocess.PIPE)
    took, *back = client.communicate(timeout=2 * GUARD_S)[0].split()
    return float(took), [int(number) for number in back]


def output(hosts: Hosts, name: str, command: str) -> str:
    return hosts.run(name, ["sh", "-c", command], stdout=subprocess.PIPE, text=True).communicate(timeout=GUARD_S)[0]


@contextlib.contextmanager
def ending(process: subprocess.Popen) -> Iterator[None]:
    """Kill the process when the block ends, so that a failed test does not wait for it."""
    try:
        yield
    finally:
        process.kill()


def test_each_host_has_its_own(make_hosts, tmp_path, monkeypatch):
    """Own addresses, ports, names, /dev/shm, process ids, private folder; shared files, working folder, environment."""
    private = tmp_path / "disk"
    private.mkdir()
    (tmp_path / "shared").write_text("all see this")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIVEN", "too")
    hosts = make_hosts("a", "b", private=[private])
    for name, other in ("ab", "ba"):
        command = f"hostname; getent hosts {other}; cat shared; echo; echo $GIVEN; pwd; ls /dev/shm disk"
        own, resolved, *lines = output(hosts, name, command).splitlines()
        assert (own, *resolved.split()) == (name, hosts.address(other), other)
        assert lines == ["all see this", "too", str(tmp_path), "/dev/shm:", "", "disk:"]
        output(hosts, name, f"echo {name} > /dev/shm/{name}; echo {name} > disk/{name}")
        echo(hosts, name)  # both use one port
    assert (hosts.shared("a"), hosts.shared("b")) == (["a"], ["b"])
    assert hosts.inside("a", private / "a").read_text() == "a\n"
    assert not list(private.iterdir())
    with pytest.raises(Failure, match="does the folder /absent exist"):
        hosts.run("a", ["true"], cwd="/absent")
    with pytest.raises(Failure, match="private folder /absent does not exist"):
        make_hosts("a", private=["/absent"])
    assert ask(hosts, "a", "b", 3)[1] == ask(hosts, "b", "a", 3)[1] == [0, 1, 2]
    assert hosts.counts()["a", "b"] == hosts.counts()["b", "a"] == {"packets": 6, "bytes": 6 * 29, "lost": 0}
    alone = output(hosts, "a", "cd /proc; echo [0-9]*").split()
    assert (alone[0], len(alone)) == ("1", 3)  # its process 1, the echo, this
    other = make_hosts("a", "b")  # two sets of hosts do not meet
    assert hosts.address("b") == other.address("b")
    assert ask(other, "a", "b", patience=0.5)[1] == []


def test_delay_and_its_change(make_hosts):
    hosts = make_hosts("a", "b", "c")
    echo(hosts, "b")
    hosts.set(delay_ms=400, between=("a", "b"))
    assert ask(hosts, "a", "b")[0] >= 0.8
    delays = {link["from"] + link["to"]: link["delay_ms"] for link in hosts.show()["links"]}
    assert {way for way, delay_ms in delays.items() if delay_ms} == {"ab", "ba"}
    hosts.set(delay_ms=0, jitter_ms=30)
    assert ask(hosts, "a", "b", 200)[1] == list(range(200))  # in their order


def test_loss(make_hosts):
    """Of 600 packets a tenth is lost on the way there, of the others a tenth on the way back; within four sigma."""
    hosts = make_hosts("a", "b", seed=3)
    echo(hosts, "b")
    hosts.set(loss=0.1)
    for _ in range(3):
        ask(hosts, "a", "b", 200, patience=2)

    def sent(source: str, target: str) -> int:
        return sum(hosts.counts()[source, target][key] for key in ("packets", "lost"))

    wait_until(lambda: sent("a", "b") == 600, "all packets")
    there = hosts.counts()["a", "b"]
    wait_until(lambda: sent("b", "a") == there["packets"], "all answers")
    assert abs(there["lost"] - 60) < 30
    assert abs(hosts.counts()["b", "a"]["lost"] - 54) < 30
    with pytest.raises(Failure, match=r"loss is in \[0, 1\]"):
        hosts.set(loss=2)


def test_rate_spaces_packets_and_its_queue_has_an_end():
    host = bridge.Host("a", "10.0.0.1")
    link = bridge.Link(host, host, rate=1e6, delay=0.5)
    due = [link.due(1000, 7.0, lambda: 0.0) for _ in range(300)]
    assert due[:3] == pytest.approx([7.501, 7.502, 7.503])
    assert [d > 0 for d in due].count(True) == pytest.approx(bridge.QUEUE_S * 1000, abs=2)
    assert link.due(1000, 8.0, lambda: 0.0) == pytest.approx(8.501)


def test_cut_and_heal(make_hosts):
    hosts = make_hosts("a", "b", "c")
    for name in "abc":
        echo(hosts, name)

    def reached() -> set[str]:
        pairs = list(itertools.permutations("abc", 2))
        with ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(lambda pair: ask(hosts, *pair, patience=0.5)[1], pairs))
        return {x + y for (x, y), answer in zip(pairs, answers, strict=True) if answer}

    def assert_reach(*pairs: str) -> None:
        """A busy machine may need a second try to get a packet through, never to hold one back."""
        wait_until(lambda: reached() == set(pairs), f"{pairs}")

    hosts.cut("a", "b")
    assert_reach("ac", "ca", "bc", "cb")
    hosts.cut("c")
    assert_reach()
    hosts.heal("a", "b")
    assert_reach("ab", "ba")
    hosts.heal()
    assert_reach("ab", "ba", "ac", "ca", "bc", "cb")
    with pytest.raises(Failure, match="no host d; the hosts are a, b, c"):
        hosts.cut("d")


def test_kill_ends_a_host_and_nothing_else(make_hosts, tmp_path):
    hosts = make_hosts("a", "b")
    here = hosts.run("a", ["sleep", "1000"])
    stays = hosts.run("b", ["sleep", "1000"])
    output(hosts, "a", "touch /dev/shm/x; setsid sh -c 'sleep 1001 & sleep 1002 &' < /dev/null > /dev/null 2>&1")
    wait_until(lambda: len(hosts.processes("a")) == 3, "the daemons")
    network = network_of(here.pid)
    hosts.kill("a")
    assert not members(network)
    assert here.wait() == -signal.SIGKILL
    assert hosts.processes("a") == {}
    wait_until(lambda: hosts.processes("b") == {stays.pid: "sleep 1000"}, "the other host's process alone")
    with pytest.raises(Failure, match="host a is down"):
        hosts.run("a", ["true"])
    hosts.revive("a")
    echo(hosts, "a")
    assert hosts.shared("a") == []
    assert ask(hosts, "b", "a")[1] == [0]


OWNER = """if True:
    import subprocess, sys, time
    from hosts import Hosts
    with Hosts(["a", "b"], private=[sys.argv[1]]) as hosts:
        hosts.run("a", ["sh", "-c", f"touch /dev/shm/{hosts.name}; sleep 1000"])
        subprocess.Popen([*hosts.ssh, "b", "sleep 1000"], stdin=subprocess.PIPE)
        while not hosts.processes("b"):
            time.sleep(0.01)
        print(hosts.name, hosts._bridge.pid, *(host["first"] for host in hosts.show()["hosts"].values()), flush=True)
        time.sleep(1000)
"""


@pytest.mark.parametrize("victim", ["owner", "bridge"])
def test_nothing_is_left_after_a_kill(make_hosts, tmp_path, victim):
    """A kill of the owner, or of the bridge: that one leaves its socket, which the next set of that name removes."""
    interfaces, command = os.listdir("/sys/class/net"), [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TOOL.parent) as owner, ending(owner):
        name, *pids = owner.stdout.readline().split()
        networks = [network_of(pid) for pid in pids[1:]]
        assert all(len(members(network)) >= 2 for network in networks)
        os.kill(owner.pid if victim == "owner" else int(pids[0]), signal.SIGKILL)
        wait_until(lambda: not any(members(network) for network in networks), "the end of both hosts")
        wait_until(lambda: not network_of(pids[0]), "the end of the bridge")
    socket = Path(f"/tmp/emulated-hosts-{name}.sock")
    assert socket.exists() == (victim == "bridge")
    assert os.listdir("/sys/class/net") == interfaces
    # what others mount, or put there, is theirs: tests run side by side
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text(encoding="utf-8")
    assert name not in os.listdir("/dev/shm")
    make_hosts("a", name=name)
    with pytest.raises(Failure, match="are up already"):
        make_hosts("a", name=name)


def ssh(hosts: Hosts, *words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*hosts.ssh, *words], capture_output=True, timeout=GUARD_S, **options)


def test_ssh(make_hosts, tmp_path):
    hosts = make_hosts("a", "b")
    data = bytes(range(256)) * 5000
    there = ssh(hosts, "-p", "22", "-o", "BatchMode=yes", "me@a", "cat;", "hostname >&2;", "exit", "7", input=data)
    assert (there.returncode, there.stdout, there.stderr) == (7, data, b"a\n")
    assert ssh(hosts, "a", "env", env={"SECRET": "x"}).stdout.count(b"SECRET") == 0
    assert ssh(hosts, "a", "kill -9 $$").returncode == 255
    assert ssh(hosts, "a", input=b"hostname").stdout == b"a\n"  # no command: a shell
    assert output(hosts, "a", " ".join([*hosts.ssh, "b", "hostname"])) == "b\n"  # from a host to another
    hosts.kill("b")
    for name, text in {"x": "no host x; the hosts are a, b", "b": "host b is down"}.items():
        refused = ssh(hosts, name, "true")
        assert (refused.returncode, refused.stderr.decode()) == (255, f"hosts: {text}\n")
    hosts.revive("b")
    hosts.cut("a", "b")
    assert ssh(hosts, "b", "true").stderr == b"hosts: host b is cut off\n"
    assert b"no hosts named absent are up" in ssh(hosts, "--name", "absent", "b", "true").stderr


def test_a_session_that_ends_early(make_hosts, tmp_path):
    """If ssh is killed, its command loses input and output; if the host goes down, ssh ends."""
    hosts = make_hosts("a")
    command = f"echo up; cat; echo on > {tmp_path}/on; sleep 1000"
    for dies in ("client", "host"):
        with subprocess.Popen([*hosts.ssh, "a", command], stdin=-1, stdout=-1, stderr=-1) as client, ending(client):
            assert client.stdout.readline() == b"up\n"
            if dies == "client":
                client.kill()
                wait_until((tmp_path / "on").exists, "the end of its input")
                assert any("sleep 1000" in line for line in hosts.processes("a").values())
            else:
                hosts.kill("a")
                assert client.wait(GUARD_S) == 255
                assert client.stderr.read() == b"hosts: connection to a lost: it is down\n"


def test_the_command(make_hosts):
    """The tool's commands on a set of hosts that "up" holds; the set ends by "down"."""
    options = ["--name", f"test-{os.getpid()}"]

    def call(command: str, *words: str) -> subprocess.CompletedProcess:
        words = (sys.executable, str(TOOL), command, *options, *words)
        return subprocess.run(words, capture_output=True, text=True, timeout=GUARD_S)

    words = [sys.executable, TOOL, "up", *options, "a", "b"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as up, ending(up):
        while "Ctrl-C" not in (line := up.stdout.readline()):
            assert line, "it did not come up"
        assert call("set", "--delay", "20", "--loss", "0.5", "--rate", "100", "--between", "a", "b").returncode == 0
        shown = call("show").stdout
        assert "a            10.77.0.1    0 processes\n" in shown
        assert "a → b: 20 ms, jitter 0 ms, loss 0.5, 100 Mbit/s; 0 packets, 0 bytes, 0 lost\n" in shown
        call("cut", "a")
        assert "b → a: cut" in call("show").stdout
        call("heal")
        call("kill", "b")
        assert "b            10.77.0.2    down" in call("show").stdout
        assert call("kill", "z").stderr == "hosts: no host z; the hosts are a, b\n"
        call("revive", "b")
        assert call("ssh", "b", "hostname").stdout == "b\n"
        assert call("down").returncode == 0
        assert up.wait(GUARD_S) == 0
