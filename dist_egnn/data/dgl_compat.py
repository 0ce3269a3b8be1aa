"""What DGL 1.1.3's distributed module does otherwise here: functions of its modules, replaced before it connects anything."""

from __future__ import annotations

import socket
from typing import Any

import dgl
from dgl.distributed import kvstore, rpc, rpc_client


def mean_this_machine(machine: int, host: str, prefix: str) -> None:
    """Have DGL take this process to be of a machine, listen on its address only, and share under names with a prefix of its own."""
    plain = kvstore.empty_shared_mem

    def empty_shared_mem(name: str, *others: Any) -> Any:
        if 0 in others[1]:  # a store without node attributes, say: what is empty cannot be mapped
            return dgl.ndarray.empty(others[1], others[2])
        return plain(prefix + name, *others)

    def usable(_: str) -> str:
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    kvstore.empty_shared_mem = empty_shared_mem
    rpc_client.get_local_machine_id = lambda _: machine
    rpc_client.get_local_usable_addr = usable
    rpc.register_sig_handler = lambda: None  # DGL's would hang


def tolerate_lost_groups() -> None:
    """Go on where trainers are gone before they are connected; DGL's server would end with them, and the next group hang."""
    connect_receiver, send_response = rpc.connect_receiver, rpc.send_response
    lost: set[int] = set()

    def connect(host: str, port: str, client: int, group: int) -> bool:
        if not connect_receiver(host, port, client, group):
            lost.add(group)
        return True

    def send(client: int, response: Any, group: int) -> None:
        if group not in lost:
            send_response(client, response, group)

    rpc.connect_receiver, rpc.send_response = connect, send


def say_when_listening(line: str) -> None:
    """Print a line once the server of this process listens."""
    plain = rpc.wait_for_senders

    def wait_for_senders(*args: Any, **options: Any) -> None:
        plain(*args, **options)
        print(line, flush=True)

    rpc.wait_for_senders = wait_for_senders
