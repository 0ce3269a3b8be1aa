"""Several hosts on one machine, and a network between them that can be slow, lossy or cut. For tests; needs root on Linux.

A host is a set of namespaces: its own addresses, /dev/shm, process ids and host name. One process, the *bridge*
(bridge.py), makes them, holds a TUN device of each and passes packets on: late, at a rate, or not at all. It ends when
the owner of a Hosts ends, however that ends, and all hosts with it. From Python: Hosts. By hand (docs/hosts.md):

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
SSH_OPTIONS = "46AaCGgKkMNnqsTtVvXxYyB:b:c:D:E:e:F:I:i:J:L:l:m:O:o:p:Q:R:S:W:w:"  # accepted; only -n does something


def _path(name: str) -> str:
    return f"/tmp/emulated-hosts-{name}.sock"


def _connect(name: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(_path(name))
    except OSError:
        connection.close()
        raise Failure(
            f"no hosts named {name} are up: start them by tools/emulated_hosts/hosts.py up --name {name} a b"
        ) from None
    return connection


def _reply(connection: socket.socket) -> dict[str, Any]:
    """Raises Failure: the bridge's error, or that it has gone."""
    try:
        reply = json.loads(connection.recv(1 << 18) or '{"error": "the hosts are gone"}')
    except ConnectionError:
        reply = {"error": "the hosts are gone"}
    if "error" in reply:
        raise Failure(reply["error"])
    return reply


def _ask(name: str, do: str, **request: Any) -> Any:
    with _connect(name) as connection:
        connection.send(json.dumps({"do": do} | request).encode())
        return _reply(connection)["answer"]


def _is_up(name: str) -> bool:
    try:
        _ask(name, "show")
    except Failure:
        return False
    return True


class Network:
    """Hosts that are up: what can be asked of them and done to them. Methods raise Failure."""

    def __init__(self, name: str) -> None:
        self.name = name

    def show(self) -> dict[str, Any]:
        """hosts: by name, its address and its process 1 as seen from here (-1: down); links: settings and counts."""
        return _ask(self.name, "show")

    def set(
        self,
        *,
        delay_ms: float | None = None,
        jitter_ms: float | None = None,
        loss: float | None = None,
        rate_mbit: float | None = None,
        between: Sequence[str] | None = None,
    ) -> None:
        """How links treat packets sent from now on; None leaves a setting as it is. Each holds in both directions.

        delay_ms: one way, so a round trip takes twice that. jitter_ms: up to so much more, drawn per packet; they keep their order.
        loss: probability in [0, 1]. rate_mbit: 10⁶ bits per second and direction, with a queue of 0.2 s; 0 for no limit.
        between: two hosts, or one (its links to all others); None: all links.
        """
        given = {"delay": delay_ms, "jitter": jitter_ms, "loss": loss, "rate": rate_mbit}
        scale = {"delay": 1e-3, "jitter": 1e-3, "loss": 1.0, "rate": 1.25e5}
        values = {key: value * scale[key] for key, value in given.items() if value is not None}
        if min(values.values(), default=0) < 0 or values.get("loss", 0) > 1:
            raise Failure(f"delay, jitter and rate are not negative, loss is in [0, 1]: {given}")
        _ask(self.name, "set", between=between, **values)

    def cut(self, *between: str) -> None:
        """Loses all packets, those under way too: between two hosts, between one and all others, or everywhere."""
        _ask(self.name, "set", between=between, cut=True)

    def heal(self, *between: str) -> None:
        """Undoes cuts: between two hosts, of one, or all."""
        _ask(self.name, "set", between=between, cut=False)

    def kill(self, host: str) -> None:
        """A power cut: ends every process of a host by SIGKILL and returns when none lives. Its memory is lost."""
        _ask(self.name, "kill", host=host)

    def revive(self, host: str) -> None:
        """Switches a killed host on: same address and links, /dev/shm and private folders empty."""
        _ask(self.name, "revive", host=host)

    def address(self, host: str) -> str:
        return self._host(host)["address"]

    def processes(self, host: str) -> dict[int, str]:
        """Process id, as seen from here, to command line; but for the host's process 1."""
        first = self._host(host)["first"]
        found = {}
        for pid in members(network_of(first)) if first > 0 else []:
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return {pid: line for pid, line in found.items() if pid != first}

    def inside(self, host: str, path: str | Path) -> Path:
        """A file of a host, also one in /dev/shm or a private folder, as a path that can be opened from here."""
        return Path(f"/proc/{self._up(host)}/root") / str(path).lstrip("/")

    def shared(self, host: str) -> list[str]:
        """What lies in a host's /dev/shm."""
        return sorted(os.listdir(self.inside(host, "/dev/shm")))

    def counts(self) -> dict[tuple[str, str], dict[str, int]]:
        """(from, to) → packets and bytes that were delivered, and packets lost (by loss, queue, cut, or a host down)."""
        return {(k["from"], k["to"]): {n: k[n] for n in ("packets", "bytes", "lost")} for k in self.show()["links"]}

    def _host(self, name: str) -> dict[str, Any]:
        hosts = self.show()["hosts"]
        if name not in hosts:
            raise Failure(f"no host {name}: there are {', '.join(hosts)}")
        return hosts[name]

    def _up(self, name: str) -> int:
        if (first := self._host(name)["first"]) < 0:
            raise Failure(f"host {name} is down")
        return first


class Hosts(Network):
    """Emulated hosts, for as long as its ``with`` block, or this process, lasts.

    private: folders, which exist, that are empty and each host's own: a disk that is not shared. All others are shared.
    seed: of losses and jitter. name: for the commands (ssh, set, …); by default one that nobody else has.
    Raises Failure where hosts cannot be had.
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
            raise Failure(f"private folder {absent[0]} is not there: make it first, it then is empty in every host")
        self._settings = {"path": _path(self.name), "owner": os.getpid(), "names": list(names), "seed": seed}
        self._settings |= {"private": folders, "interface": interface, "mtu": mtu}
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        if _is_up(self.name):
            raise Failure(f"hosts named {self.name} are up already: give these another name, or end those by down")
        Path(_path(self.name)).unlink(missing_ok=True)  # of a bridge that was killed
        words = [sys.executable, str(BRIDGE), json.dumps(self._settings)]
        self._bridge = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
        assert self._bridge.stdout
        with self._bridge.stdout as out:
            word = out.readline().decode().strip()
        if word != "up":
            self._bridge.wait()
            raise Failure(word or "the bridge ended at its start")
        return self

    def __exit__(self, *_: object) -> None:
        self._bridge.terminate()
        self._bridge.wait()
        for process in self._started:
            process.wait()  # dead; until it is waited for, its host's process 1 stays a zombie

    def wait(self) -> None:
        """Until somebody says down."""
        self._bridge.wait()

    def run(self, host: str, argv: Sequence[str], *, cwd: str | Path | None = None, **options: Any) -> subprocess.Popen:
        """subprocess.Popen in a host: environment and working folder are kept, its pid is as seen from here."""
        process = start(self._up(host), argv, cwd=str(cwd or os.getcwd()), **options)
        self._started.append(process)
        return process

    @property
    def ssh(self) -> list[str]:
        """The words that stand for ssh with these hosts."""
        return [sys.executable, str(Path(__file__).resolve()), "ssh", "--name", self.name]


def _copy(source: int, sink: int, *ends: int) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more
        while data := os.read(source, 65536):
            while data:
                data = data[os.write(sink, data) :]
    for end in ends:
        os.close(end)


def _ssh(words: list[str]) -> int:
    """What ssh does without a terminal: a command by sh, its three streams, its exit status; 255 if that fails."""
    options, rest = getopt.getopt(words, SSH_OPTIONS, ["name="])
    if not rest:
        raise Failure("ssh needs a host: python tools/emulated_hosts/hosts.py ssh a hostname")
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
    told = network.show()
    for name, host in told["hosts"].items():
        state = f"{len(network.processes(name))} processes" if host["first"] > 0 else "down"
        print(f"{name:12} {host['address']:12} {state}")
    for k in told["links"]:
        how = "cut" if k["cut"] else f"{k['delay_ms']:g} ms, jitter {k['jitter_ms']:g} ms, loss {k['loss']:g}"
        how += f", {k['rate_mbit']:g} Mbit/s" if k["rate_mbit"] and not k["cut"] else ""
        print(f"{k['from']} → {k['to']}: {how}; {k['packets']} packets, {k['bytes']} bytes, {k['lost']} lost")


def _up(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with Hosts(args.hosts, private=args.private, mtu=args.mtu, seed=args.seed, name=args.name) as hosts:
        _show(hosts)
        print(f"up; Ctrl-C, or python tools/emulated_hosts/hosts.py down --name {args.name}, ends them", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            hosts.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, does: str, example: str, run: Callable[[argparse.Namespace], object]) -> Any:
        new = commands.add_parser(
            name, help=does, description=does, epilog=f"Example: python tools/emulated_hosts/hosts.py {example}"
        )
        new.add_argument(
            "--name", default="default", help="of this set of hosts, if there are several (default: %(default)s)"
        )
        new.set_defaults(run=run)
        return new

    up = command("up", "Starts hosts and keeps them until Ctrl-C.", "up a b c", _up)
    up.add_argument("hosts", nargs="+")
    up.add_argument("--private", action="append", default=[], metavar="FOLDER", help="each host's own, and empty")
    up.add_argument("--mtu", type=int, default=MTU, help="bytes of the largest packet (default: %(default)s)")
    up.add_argument("--seed", type=int, default=0, help="of losses and jitter")
    ssh = command("ssh", "ssh without a terminal: ssh [-p PORT] [USER@]HOST COMMAND…", "ssh a hostname", lambda _: None)
    ssh.add_argument("words", nargs="*")
    one = command(
        "set", "Changes links.", "set --delay 20 --loss 0.02 --between a b",
        lambda a: Network(a.name).set(
            delay_ms=a.delay, jitter_ms=a.jitter, loss=a.loss, rate_mbit=a.rate, between=a.between
        ),
    )  # fmt: skip
    one.add_argument("--delay", type=float, help="ms, one way")
    one.add_argument("--jitter", type=float, help="ms, at most, on top of the delay")
    one.add_argument("--loss", type=float, help="probability of a packet's loss")
    one.add_argument("--rate", type=float, help="Mbit/s; 0: no limit")
    one.add_argument("--between", nargs="+", metavar="HOST", help="two hosts, or one and all others (default: all)")
    cut = command(
        "cut", "Cuts links: two hosts, one from all others, all.", "cut a b", lambda a: Network(a.name).cut(*a.hosts)
    )
    cut.add_argument("hosts", nargs="*")
    heal = command("heal", "Undoes cuts.", "heal", lambda a: Network(a.name).heal(*a.hosts))
    heal.add_argument("hosts", nargs="*")
    kill = command("kill", "Cuts a host's power.", "kill a", lambda a: Network(a.name).kill(a.host))
    kill.add_argument("host")
    revive = command("revive", "Switches a killed host on.", "revive a", lambda a: Network(a.name).revive(a.host))
    revive.add_argument("host")
    command("show", "Hosts, links, what went over them.", "show", lambda a: _show(Network(a.name)))
    command("down", "Ends the hosts.", "down", lambda a: _ask(a.name, "down"))
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
    os._exit(status)  # a thread may still wait for stdin
