"""Measure the network between two emulated hosts: round trip of a small packet, throughput of a TCP connection.

Example: python tools/emulated_hosts/measure.py --delay 20 --loss 0.02
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import threading
import time

from hosts import MTU, Hosts

PORT, ROUNDS = 7000, 50


def serve() -> None:
    """Echo UDP packets, discard TCP data."""
    echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind(("", PORT))
    sink = socket.create_server(("", PORT))

    def drop() -> None:
        connection, _ = sink.accept()
        room = bytearray(1 << 20)
        while connection.recv_into(room):
            pass

    threading.Thread(target=drop, daemon=True).start()
    print("ready", flush=True)
    while True:
        echo.sendto(*echo.recvfrom(100))


def measure(address: str, seconds: float) -> None:
    """Print round trips in ms and the throughput over ``seconds`` in MB/s."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ping:
        ping.settimeout(1)
        trips = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            ping.sendto(b"x", (address, PORT))
            try:
                ping.recv(100)
                trips.append((time.perf_counter() - started) * 1e3)
            except TimeoutError:
                pass
    median = f"median {statistics.median(trips):.2f} ms, minimum {min(trips):.2f} ms" if trips else "all lost"
    print(f"round trip: {median}; {ROUNDS - len(trips)} of {ROUNDS} lost")
    sent, block = 0, bytes(1 << 18)
    with socket.create_connection((address, PORT)) as connection:
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            sent += connection.send(block)
    print(f"throughput: {sent / elapsed / 1e6:.1f} MB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0, help="ms, one way")
    parser.add_argument("--jitter", type=float, default=0, help="ms")
    parser.add_argument("--loss", type=float, default=0, help="probability that a packet is lost")
    parser.add_argument("--rate", type=float, default=0, help="Mbit/s; 0: no limit")
    parser.add_argument("--mtu", type=int, default=MTU, help="bytes of the largest packet (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="duration of sending")
    args = parser.parse_args()
    with Hosts(["a", "b"], mtu=args.mtu) as hosts:
        hosts.set(delay_ms=args.delay, jitter_ms=args.jitter, loss=args.loss, rate_mbit=args.rate)
        server = hosts.run("b", [sys.executable, __file__, "_serve"], stdout=subprocess.PIPE)
        assert server.stdout
        server.stdout.readline()
        hosts.run("a", [sys.executable, __file__, "_measure", hosts.address("b"), str(args.seconds)]).wait()
        server.stdout.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["_serve"]:
        serve()
    elif sys.argv[1:2] == ["_measure"]:
        measure(sys.argv[2], float(sys.argv[3]))
    else:
        main()
