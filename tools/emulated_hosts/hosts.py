"""Emulated hosts on one machine, with a network that can be slow, lossy or cut. For tests; needs root on Linux.

A host is a set of namespaces: its own addresses, /dev/shm, process ids and host name. One process, the *bridge*
(bridge.py), creates them, holds a TUN device of each and forwards packets: delayed, at a limited rate, or not at all. When
the owner of a Hosts ends in any way, the bridge and all hosts end. From Python: Hosts. From a shell (docs/hosts.md):

    python tools/emulated_hosts/hosts.py up a b c
    python tools/emulated_hosts/hosts.py ssh a hostname
"""

from __future__ import annotations

import argparse
import contextlib
import getopt
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from namespaces import Failure, members, missing, network_of, start

BRIDGE = Path(__file__).resolve().with_name("bridge.py")
INTERFACE, MTU = "net0", 9000
SSH_OPTIONS = "46AaCGgKkMNnqsTtVvXxYyB:b:c:D:E:e:F:I:i:J:L:l:m:O:o:p:Q:R:S:W:w:"  # accepted, but only -n has an effect


def _path(name: str) -> str:
    return f"/tmp/emulated-hosts-{name}.sock"


def _connect(name: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(_path(name))
    except OSError:
        connection.close()
        raise Failure(
            f"no hosts named {name} are up; run: python tools/emulated_hosts/hosts.py up --name {name} a b"
        ) from None
    return connection


def _reply(connection: socket.socket) -> dict[str, Any]:
    """The reply of the bridge. Raises Failure for its error, or if it has ended."""
    try:
        reply = json.loads(connection.recv(1 << 18) or '{"error": "the hosts have ended"}')
    except ConnectionError:
        reply = {"error": "the hosts have ended"}
    if "error" in reply:
        raise Failure(reply["error"])
    return reply


def _request(name: str, do: str, **request: Any) -> Any:
    with _connect(name) as connection:
        connection.send(json.dumps({"do": do} | request).encode())
        return _reply(connection)["answer"]


def _is_up(name: str) -> bool:
    try:
        _request(name, "show")
    except Failure:
        return False
    return True


class Network:
    """A set of running hosts by its name: state and operations. Methods raise Failure."""

    def __init__(self, name: str) -> None:
        self.name = name

    def show(self) -> dict[str, Any]:
        """hosts: name → address and the pid of its process 1 here (-1: down); links: settings and counts."""
        return _request(self.name, "show")

    def set(
        self,
        *,
        delay_ms: float | None = None,
        jitter_ms: float | None = None,
        loss: float | None = None,
        rate_mbit: float | None = None,
        between: Sequence[str] | None = None,
    ) -> None:
        """Settings of links for packets sent from now on, in both directions; None keeps a setting.

        delay_ms: one way. jitter_ms: maximum of an additional random delay per packet, which keeps the order.
        loss: probability in [0, 1]. rate_mbit: 10⁶ bits per second and direction, with a queue of 0.2 s; 0 for no limit.
        between: two hosts, or one (its links to all others); None: all links.
        """
        settings = {"delay": delay_ms, "jitter": jitter_ms, "loss": loss, "rate": rate_mbit}
        scale = {"delay": 1e-3, "jitter": 1e-3, "loss": 1.0, "rate": 1.25e5}
        values = {key: value * scale[key] for key, value in settings.items() if value is not None}
        if min(values.values(), default=0) < 0 or values.get("loss", 0) > 1:
            raise Failure(f"delay, jitter and rate must not be negative, loss is in [0, 1]: {settings}")
        _request(self.name, "set", between=between, **values)

    def cut(self, *between: str) -> None:
        """Drop all packets, including those in flight: between two hosts, between one and all others, or everywhere."""
        _request(self.name, "set", between=between, cut=True)

    def heal(self, *between: str) -> None:
        """Undo cuts between two hosts, of one host, or all."""
        _request(self.name, "set", between=between, cut=False)

    def kill(self, host: str) -> None:
        """Kill every process of a host with SIGKILL, as in a power cut, and wait until they have ended."""
        _request(self.name, "kill", host=host)

    def revive(self, host: str) -> None:
        """Start a killed host again: same address and links, empty /dev/shm and private folders."""
        _request(self.name, "revive", host=host)

    def address(self, host: str) -> str:
        return self._host(host)["address"]

    def processes(self, host: str) -> dict[int, str]:
        """Pid here → command line, without the host's process 1."""
        first = self._host(host)["first"]
        lines = {}
        for pid in members(network_of(first)) if first > 0 else []:
            with contextlib.suppress(OSError):
                lines[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return {pid: line for pid, line in lines.items() if pid != first}

    def inside(self, host: str, path: str | Path) -> Path:
        """The path here of a file of a host, also in /dev/shm or a private folder."""
        return Path(f"/proc/{self._up(host)}/root") / str(path).lstrip("/")

    def shared(self, host: str) -> list[str]:
        """The files in a host's /dev/shm."""
        return sorted(os.listdir(self.inside(host, "/dev/shm")))

    def counts(self) -> dict[tuple[str, str], dict[str, int]]:
        """(from, to) → packets and bytes delivered, packets lost (by loss, full queue, cut or a killed host)."""
        return {(k["from"], k["to"]): {n: k[n] for n in ("packets", "bytes", "lost")} for k in self.show()["links"]}

    def _host(self, name: str) -> dict[str, Any]:
        hosts = self.show()["hosts"]
        if name not in hosts:
            raise Failure(f"no host {name}: the hosts are {', '.join(hosts)}")
        return hosts[name]

    def _up(self, name: str) -> int:
        if (first := self._host(name)["first"]) < 0:
            raise Failure(f"host {name} is down")
        return first


class Hosts(Network):
    """Emulated hosts that live as long as the ``with`` block or this process.

    private: existing folders that each host has for itself, initially empty, as a disk that is not shared; all others are
    shared. seed: for losses and jitter. name: for the shell commands (ssh, set, …); unique by default.
    Raises Failure if hosts cannot be created here.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        private: Iterable[str | Path] = (),
        interface: str = INTERFACE,
        mtu: int = MTU,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name or f"{os.getpid()}-{secrets.token_hex(3)}")
        wrong = [n for n in names if not re.fullmatch(r"[a-z][a-z0-9-]{0,62}", n)]
        if wrong or len(set(names)) < len(names) or not 1 <= len(names) <= 254:
            raise Failure(f"hosts need 1 to 254 different names of letters, digits and '-': {' '.join(names)}")
        if reason := missing():
            raise Failure(reason)
        folders = [str(Path(folder).resolve()) for folder in private]
        if absent := [folder for folder in folders if not os.path.isdir(folder)]:
            raise Failure(f"private folder {absent[0]} does not exist; make it first")
        self._settings = {"path": _path(self.name), "owner": os.getpid(), "names": list(names), "seed": seed}
        self._settings |= {"private": folders, "interface": interface, "mtu": mtu}
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        if _is_up(self.name):
            raise Failure(
                f"hosts named {self.name} are up already; use another --name, or end them with: hosts.py down --name {self.name}"
            )
        Path(_path(self.name)).unlink(missing_ok=True)  # left by a bridge that was killed
        command = [sys.executable, str(BRIDGE), json.dumps(self._settings)]
        self._bridge = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._bridge.stdout
        with self._bridge.stdout as out:
            status = out.readline().decode().strip()
        if status != "up":
            self._bridge.wait()
            raise Failure(status or "the bridge ended at its start")
        return self

    def __exit__(self, *_: object) -> None:
        self._bridge.terminate()
        self._bridge.wait()
        for process in self._started:
            process.wait()  # already ended; otherwise its host's process 1 stays a zombie

    def wait(self) -> None:
        """Wait until the hosts are ended with the command down."""
        self._bridge.wait()

    def run(self, host: str, argv: Sequence[str], *, cwd: str | Path | None = None, **options: Any) -> subprocess.Popen:
        """subprocess.Popen in a host, with our environment and working folder; its pid is the one here."""
        process = start(self._up(host), argv, cwd=str(cwd or os.getcwd()), **options)
        self._started.append(process)
        return process

    @property
    def ssh(self) -> list[str]:
        """The command that replaces ssh for these hosts."""
        return [sys.executable, str(Path(__file__).resolve()), "ssh", "--name", self.name]


def _copy(source: int, sink: int, *ends: int) -> None:
    with contextlib.suppress(OSError):  # the reader has closed
        while data := os.read(source, 65536):
            while data:
                data = data[os.write(sink, data) :]
    for end in ends:
        os.close(end)


def _ssh(words: list[str]) -> int:
    """ssh without a terminal: run a command by sh with its three streams; returns its exit status, 255 on failure."""
    options, rest = getopt.getopt(words, SSH_OPTIONS, ["name="])
    if not rest:
        raise Failure("ssh needs a host; for example: python tools/emulated_hosts/hosts.py ssh a hostname")
    host = rest[0].rpartition("@")[2]
    with _connect(dict(options).get("--name", "default")) as connection:
        (given, stdin), (out, given_out), (err, given_err) = os.pipe(), os.pipe(), os.pipe()
        request = {"do": "ssh", "host": host, "command": " ".join(rest[1:])}
        socket.send_fds(connection, [json.dumps(request).encode()], [given, given_out, given_err])
        for file in (given, given_out, given_err):
            os.close(file)
        _reply(connection)
        source = os.open(os.devnull, os.O_RDONLY) if ("-n", "") in options else 0
        threading.Thread(target=_copy, args=(source, stdin, stdin), daemon=True).start()
        outputs = [threading.Thread(target=_copy, args=(pipe, file, pipe)) for pipe, file in ((out, 1), (err, 2))]
        for thread in outputs:
            thread.start()
        for thread in outputs:
            thread.join()
        ended = _reply(connection)
    if not ended["up"]:
        raise Failure(f"connection to {host} lost: it is down")
    return ended["status"] if ended["status"] >= 0 else 255  # as ssh does after a signal


def _show(network: Network) -> None:
    state = network.show()
    for name, host in state["hosts"].items():
        status = f"{len(network.processes(name))} processes" if host["first"] > 0 else "down"
        print(f"{name:12} {host['address']:12} {status}")
    for k in state["links"]:
        settings = "cut" if k["cut"] else f"{k['delay_ms']:g} ms, jitter {k['jitter_ms']:g} ms, loss {k['loss']:g}"
        settings += f", {k['rate_mbit']:g} Mbit/s" if k["rate_mbit"] and not k["cut"] else ""
        print(f"{k['from']} → {k['to']}: {settings}; {k['packets']} packets, {k['bytes']} bytes, {k['lost']} lost")


def _up(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with Hosts(args.hosts, private=args.private, mtu=args.mtu, seed=args.seed, name=args.name) as hosts:
        _show(hosts)
        print(f"up; end with Ctrl-C or: python tools/emulated_hosts/hosts.py down --name {args.name}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            hosts.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, does: str, example: str, run: Callable[[argparse.Namespace], object]) -> Any:
        new = commands.add_parser(
            name, help=does, description=does, epilog=f"Example: python tools/emulated_hosts/hosts.py {example}"
        )
        new.add_argument("--name", default="default", help="name of the set of hosts (default: %(default)s)")
        new.set_defaults(run=run)
        return new

    up = command("up", "Start hosts and keep them until Ctrl-C.", "up a b c", _up)
    up.add_argument("hosts", nargs="+")
    up.add_argument(
        "--private",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder that each host has for itself, initially empty",
    )
    up.add_argument("--mtu", type=int, default=MTU, help="bytes of the largest packet (default: %(default)s)")
    up.add_argument("--seed", type=int, default=0, help="seed of losses and jitter")
    ssh = command("ssh", "ssh without a terminal: ssh [-p PORT] [USER@]HOST COMMAND…", "ssh a hostname", lambda _: None)
    ssh.add_argument("words", nargs="*")
    one = command(
        "set", "Change links.", "set --delay 20 --loss 0.02 --between a b",
        lambda a: Network(a.name).set(
            delay_ms=a.delay, jitter_ms=a.jitter, loss=a.loss, rate_mbit=a.rate, between=a.between
        ),
    )  # fmt: skip
    one.add_argument("--delay", type=float, help="ms, one way")
    one.add_argument("--jitter", type=float, help="ms, maximum of an additional random delay")
    one.add_argument("--loss", type=float, help="probability that a packet is lost")
    one.add_argument("--rate", type=float, help="Mbit/s; 0: no limit")
    one.add_argument("--between", nargs="+", metavar="HOST", help="two hosts, or one and all others (default: all)")
    cut = command(
        "cut", "Cut links: two hosts, one from all others, or all.", "cut a b", lambda a: Network(a.name).cut(*a.hosts)
    )
    cut.add_argument("hosts", nargs="*")
    heal = command("heal", "Undo cuts.", "heal", lambda a: Network(a.name).heal(*a.hosts))
    heal.add_argument("hosts", nargs="*")
    kill = command("kill", "Kill a host, as in a power cut.", "kill a", lambda a: Network(a.name).kill(a.host))
    kill.add_argument("host")
    revive = command("revive", "Start a killed host again.", "revive a", lambda a: Network(a.name).revive(a.host))
    revive.add_argument("host")
    command("show", "Show hosts, links and their traffic.", "show", lambda a: _show(Network(a.name)))
    command("down", "End the hosts.", "down", lambda a: _request(a.name, "down"))
    return parser


def main(words: list[str]) -> int:
    is_ssh = words[:1] == ["ssh"] and words[1:2] != ["--help"]
    try:
        if is_ssh:
            return _ssh(words[1:])
        args = _parser().parse_args(words)
        args.run(args)
        return 0
    except (Failure, getopt.GetoptError) as error:
        print(f"hosts: {error}", file=sys.stderr, flush=True)
        return 255 if is_ssh else 1


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # a thread may still read stdin
