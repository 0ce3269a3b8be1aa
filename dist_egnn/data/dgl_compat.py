"""What depends on the version of DGL: 1.1.3 with Python 3.11, 2.1.0 with Python 3.12. Importing this imports no DGL.

Servers exist with 1.1.3 only. Call the patches of its distributed module before it connects.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import socket
import sys
from types import ModuleType
from typing import Any

from ..errors import Failure


def hide_graphbolt() -> None:
    """Let DGL 2 load without dgl.graphbolt, which is compiled for older torch. Call it before the first import of DGL."""
    sys.modules.setdefault("dgl.graphbolt", ModuleType("dgl.graphbolt"))


def check_servers() -> None:
    """Raise Failure for DGL 2, whose graph servers end with their first trainers (it has no keep_alive)."""
    if (version := importlib.metadata.version("dgl")).split(".")[0] != "1":
        remedy = "use Python 3.11 with dgl==1.1.3, or distegnn train on one machine"
        raise Failure(f"dgl {version}: its graph servers cannot serve a restarted training; {remedy}")


def set_machine(machine: int, host: str, prefix: str) -> None:
    """Fix this process's machine number and address, and prefix the names of its shared memory.

    DGL derives the number from the host's interfaces, listens on any, and two servers on one host collide in shared
    memory. It also cannot map empty arrays (a store without node attributes), and its signal handler hangs.
    """
    import dgl
    from dgl.distributed import kvstore, rpc, rpc_client

    create_shared_memory = kvstore.empty_shared_mem

    def empty_shared_mem(name: str, is_create: bool, shape: Any, dtype: str) -> Any:
        if 0 in shape:
            return dgl.ndarray.empty(shape, dtype)
        return create_shared_memory(prefix + name, is_create, shape, dtype)

    def free_address(_: str) -> str:
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    kvstore.empty_shared_mem = empty_shared_mem
    rpc_client.get_local_machine_id = lambda _: machine
    rpc_client.get_local_usable_addr = free_address
    rpc.register_sig_handler = lambda: None


def ignore_lost_trainers() -> None:
    """Keep a server alive when trainers exit before it connects back to them: DGL's fails, and the next group hangs."""
    from dgl.distributed import rpc

    connect_receiver, send_response = rpc.connect_receiver, rpc.send_response
    lost_groups: set[int] = set()

    def connect(host: str, port: str, client: int, group: int) -> bool:
        if not connect_receiver(host, port, client, group):
            lost_groups.add(group)
        return True

    def send(client: int, response: Any, group: int) -> None:
        if group not in lost_groups:
            send_response(client, response, group)

    rpc.connect_receiver, rpc.send_response = connect, send


def print_when_listening(line: str) -> None:
    """Print a line once this process's server listens. DGL 1.1.3 has no hook before it waits for clients."""
    from dgl.distributed import rpc

    wait_for_senders = rpc.wait_for_senders

    def wait_and_print(*args: Any, **options: Any) -> None:
        wait_for_senders(*args, **options)
        print(line, flush=True)

    rpc.wait_for_senders = wait_and_print


def skip_exit_barrier() -> None:
    """Let a trainer exit alone. DGL 1.1.3 registers a barrier of all trainers at exit, which hangs if one has died."""
    from dgl.distributed import dist_context

    atexit.unregister(dist_context.exit_client)
