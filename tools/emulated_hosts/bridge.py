"""The process that creates a set of emulated hosts and forwards packets between them. Started by hosts.py."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import random
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from namespaces import Failure, children_in, members, network_of, process_one, start

NETWORK = "10.77.0."  # isolated, so several sets of hosts may use it
QUEUE_S = 0.2  # a link drops packets that would wait longer
LOGIN = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "SHELL": "/bin/sh"}
LOGIN |= {"HOME": os.path.expanduser("~"), "USER": "root", "LOGNAME": "root"}  # the environment of an ssh command


@dataclass
class Link:
    """One direction between two hosts: its settings and its counts."""

    source: Host
    target: Host
    delay: float = 0.0  # seconds
    jitter: float = 0.0
    loss: float = 0.0
    rate: float = 0.0  # bytes per second; 0: no limit
    cut: bool = False
    free: float = 0.0  # time at which everything sent so far has left at this rate
    last: float = 0.0  # arrival time of the last packet in flight
    waiting: int = 0
    packets: int = 0
    volume: int = 0  # bytes
    lost: int = 0

    def due(self, size: int, now: float, draw: Callable[[], float]) -> float:
        """Arrival time of a packet sent now, not before an earlier one; negative: it is lost."""
        if self.cut or (self.loss and draw() < self.loss) or self.free - now > QUEUE_S:
            return -1.0
        due = now
        if self.rate:
            due = self.free = max(now, self.free) + size / self.rate
        return max(due + self.delay + (self.jitter and self.jitter * draw()), self.last if self.waiting else 0.0)

    def deliver(self, packet: bytes) -> None:
        try:
            os.write(-1 if self.cut else self.target.tun, packet)
            self.packets += 1
            self.volume += len(packet)
        except OSError:  # the link is cut or the host is down
            self.lost += 1

    def state(self) -> dict[str, Any]:
        settings = {"delay_ms": self.delay * 1e3, "jitter_ms": self.jitter * 1e3, "loss": self.loss}
        counts = {"packets": self.packets, "bytes": self.volume, "lost": self.lost}
        ends = {"from": self.source.name, "to": self.target.name}
        return ends | settings | {"rate_mbit": self.rate * 8e-6, "cut": self.cut} | counts


@dataclass
class Host:
    name: str
    address: str
    links: dict[bytes, Link] = field(default_factory=dict)  # by destination address
    first: int = -1  # pid of its process 1 here
    tun: int = -1


class Bridge:
    """Starts hosts, forwards packets between them and answers requests on a socket, in one thread."""

    def __init__(self, path: str, owner: int, names: list[str], seed: int, **settings: Any) -> None:
        """settings: private, interface, mtu."""
        self.path, self.settings, self.draw = path, settings, random.Random(seed).random
        self.hosts = {name: Host(name, f"{NETWORK}{k}") for k, name in enumerate(names, 1)}
        for one, other in itertools.permutations(self.hosts.values(), 2):
            one.links[socket.inet_aton(other.address)] = Link(one, other)
        self.in_flight: list[tuple[float, int, bytes, Link]] = []
        self.order = itertools.count()
        self.watched = selectors.SelectSelector()  # epoll's timeouts are whole milliseconds
        self.watched.register(
            os.pidfd_open(owner), selectors.EVENT_READ, sys.exit
        )  # fails if the owner has ended already
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.umask(0o077)
        self.listener.bind(path)
        self.listener.listen(64)
        self.watched.register(self.listener, selectors.EVENT_READ, self.answer)

    def links(self, between: Sequence[str] | None) -> list[Link]:
        """Both directions between two hosts, of one host with all others, or all."""
        for name in between or ():
            self.host(name)
        ends = set(between or ())
        return [k for h in self.hosts.values() for k in h.links.values() if ends <= {k.source.name, k.target.name}]

    def host(self, name: str) -> Host:
        if name not in self.hosts:
            raise Failure(f"no host {name}; the hosts are {', '.join(self.hosts)}")
        return self.hosts[name]

    def up(self, name: str) -> None:
        host = self.host(name)
        if host.first > 0:
            raise Failure(f"host {name} is up")
        names = "".join(f"{h.address} {h.name}\n" for h in self.hosts.values())
        ours, report = socket.socketpair()
        with ours, report:
            with children_in(""):
                if not (first := os.fork()):
                    ours.close()
                    names = f"127.0.0.1 localhost\n{names}"
                    process_one(report, name=name, address=host.address, names=names, **self.settings)
            report.close()
            status, files, _, _ = socket.recv_fds(ours, 1000, 1)
        if not files:
            raise Failure(f"host {name}: {status.decode() or 'it ended at its start'}")
        host.first, host.tun = first, files[0]
        self.watched.register(host.tun, selectors.EVENT_READ, lambda: self.forward(host))

    def kill(self, name: str) -> None:
        """Kill the host and wait until all its processes have ended."""
        host = self.host(name)
        if host.first < 0:
            return
        network = network_of(host.first)
        os.kill(host.first, signal.SIGKILL)
        self.watched.unregister(host.tun)
        os.close(host.tun)
        while network and members(network):
            time.sleep(0.002)
        host.first = host.tun = -1

    def forward(self, host: Host) -> None:
        """Forward packets that a host sends, a limited number, so that other hosts get their turn."""
        now = time.monotonic()
        for _ in range(64):
            try:
                packet = os.read(host.tun, 65536)
            except OSError:  # no packets at present
                return
            link = host.links.get(packet[16:20]) if packet[0] >> 4 == 4 else None
            if link is None:
                continue
            due = link.due(len(packet), now, self.draw)
            if due < 0:
                link.lost += 1
            elif due <= now and not link.waiting:
                link.deliver(packet)
            else:
                link.last, link.waiting = due, link.waiting + 1
                heapq.heappush(self.in_flight, (due, next(self.order), packet, link))

    def serve(self) -> None:
        while True:
            wait = max(0.0, self.in_flight[0][0] - time.monotonic()) if self.in_flight else None
            for key, _ in self.watched.select(wait):
                key.data()
            now = time.monotonic()
            while self.in_flight and self.in_flight[0][0] <= now:
                _, _, packet, link = heapq.heappop(self.in_flight)
                link.waiting -= 1
                link.deliver(packet)

    def close(self) -> None:
        os.unlink(self.path)
        for name in self.hosts:
            self.kill(name)

    def answer(self) -> None:
        """Answer one request, {"do": operation, arguments}, with an answer or an error."""
        connection, _ = self.listener.accept()
        connection.settimeout(5)
        files: list[int] = []
        try:
            text, files, _, _ = socket.recv_fds(connection, 1 << 18, 3)
            request = json.loads(text or "{}")
            reply = {"answer": getattr(self, f"do_{request.pop('do')}")(connection, files, **request)}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reply = {"error": f"invalid request: {error}"}
        except (Failure, OSError) as error:
            reply = {"error": str(error)}
        for file in files:
            os.close(file)
        with contextlib.suppress(OSError):
            connection.send(json.dumps(reply).encode())

    def do_show(self, *_: Any) -> dict[str, Any]:
        hosts = {h.name: {"address": h.address, "first": h.first} for h in self.hosts.values()}
        return {"hosts": hosts, "links": [link.state() for link in self.links(None)]}

    def do_set(self, *_: Any, between: Sequence[str] | None, **values: Any) -> None:
        for link, (name, value) in itertools.product(self.links(between), values.items()):
            setattr(link, name, value)
            if name == "rate":
                link.free = 0.0

    def do_kill(self, *_: Any, host: str) -> None:
        self.kill(host)

    def do_revive(self, *_: Any, host: str) -> None:
        self.up(host)

    def do_down(self, connection: socket.socket, *_: Any) -> None:
        connection.send(json.dumps({"answer": None}).encode())
        sys.exit()

    def do_ssh(self, connection: socket.socket, files: list[int], host: str, command: str) -> None:
        target = self.host(host)
        if target.first < 0:
            raise Failure(f"host {host} is down")
        if target.links and all(link.cut for link in self.links([host])):
            raise Failure(f"host {host} is cut off")
        streams: dict[str, Any] = dict(zip(("stdin", "stdout", "stderr"), files, strict=True))
        argv = ["/bin/sh", "-c", command] if command else ["/bin/sh"]
        process = start(target.first, argv, cwd=LOGIN["HOME"], env=LOGIN, start_new_session=True, **streams)
        ended = os.pidfd_open(process.pid)

        def report_exit() -> None:
            self.watched.unregister(ended)
            os.close(ended)
            with connection, contextlib.suppress(OSError):
                connection.send(json.dumps({"status": process.wait(), "up": target.first > 0}).encode())

        self.watched.register(ended, selectors.EVENT_READ, report_exit)


def main(text: str) -> None:
    """Run the bridge until it is ended; prints "up" or one line with the error."""
    settings = json.loads(text)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        bridge = Bridge(**settings)
    except OSError as error:
        print(f"hosts: {settings['path']}: {error.strerror}", flush=True)
        return
    try:
        for name in bridge.hosts:
            bridge.up(name)
        print("up", flush=True)
        bridge.serve()
    except Failure as error:
        print(error, flush=True)
    finally:
        bridge.close()


if __name__ == "__main__":
    main(sys.argv[1])
