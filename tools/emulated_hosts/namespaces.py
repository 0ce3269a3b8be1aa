"""One emulated host: its namespaces, mounts and TUN device, and starting a process in it. For hosts.py.

A host has network, mount, PID, IPC and UTS namespaces and a process 1. When that ends, the kernel ends all others.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNT, _NEW_UTS, _NEW_IPC, _NEW_PID, _NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000
_INSIDE = _NEW_MOUNT | _NEW_UTS | _NEW_IPC | _NEW_NET  # without the PID namespace, which only applies to children
_BIND, _PRIVATE = 0x1000, 0x44000


class Failure(Exception):
    """An error that the user can correct, in one line."""


def _call(function: str, *arguments: Any) -> None:
    """Call a function of libc that Python 3.11 does not provide; raises OSError."""
    if getattr(_libc, function)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def missing() -> str:
    """Why emulated hosts are impossible here; '' if they are possible."""
    if not sys.platform.startswith("linux") or os.geteuid():
        return "emulated hosts need root on Linux"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"emulated hosts need /dev/net/tun: {error.strerror}"
    if not (child := os.fork()):
        os._exit(_libc.unshare(_INSIDE | _NEW_PID) != 0)
    return "emulated hosts need permission to create namespaces" if os.waitpid(child, 0)[1] else ""


@contextlib.contextmanager
def children_in(space: str) -> Iterator[None]:
    """Children that this thread forks in the block are in the PID namespace of that file; '' creates one."""
    try:
        if space:
            with open(space, encoding="utf-8") as file:
                _call("setns", file.fileno(), _NEW_PID)
        else:
            _call("unshare", _NEW_PID)
        yield
    finally:
        with open("/proc/self/ns/pid", encoding="utf-8") as own:
            _call("setns", own.fileno(), _NEW_PID)


def start(
    first: int, argv: Sequence[str], *, cwd: str, preexec_fn: Callable[[], Any] | None = None, **options: Any
) -> subprocess.Popen:
    """Start a child process in the host whose process 1 has the pid ``first`` here. Raises Failure for a missing cwd."""
    with contextlib.ExitStack() as files:
        spaces = [
            files.enter_context(open(f"/proc/{first}/ns/{kind}", encoding="utf-8"))
            for kind in ("net", "uts", "ipc", "mnt")
        ]
        reason = files.enter_context(tempfile.TemporaryFile())  # subprocess does not pass on the error of the child

        def enter() -> None:
            try:
                for space in spaces:
                    _call("setns", space.fileno(), 0)
                os.chdir(cwd)
            except OSError as error:
                os.write(reason.fileno(), str(error).encode())
                raise
            if preexec_fn:
                preexec_fn()

        with children_in(f"/proc/{first}/ns/pid"):
            try:
                return subprocess.Popen(argv, preexec_fn=enter, **options)
            except subprocess.SubprocessError:
                reason.seek(0)
                error = reason.read().decode()
                raise Failure(f"cannot enter the host ({error}): does the folder {cwd} exist in it?") from None


def network_of(pid: int | str) -> str:
    """The network namespace of a process; '' if it has ended (a zombie has none)."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def members(network: str) -> list[int]:
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and network_of(pid) == network]


def _switch_on(interface: str, address: str = "", mtu: int = 0) -> None:
    """Switch a network interface on, with an address in a /24 network if given."""
    requests = [(0x8914, struct.pack("h", 0x41))]  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING
    if address:
        inet = [struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(a)) for a in (address, "255.255.255.0")]
        sizes = [struct.pack("i", n) for n in (mtu, 5000)]
        requests = [
            *zip((0x8916, 0x891C, 0x8922, 0x8943), inet + sizes, strict=True),
            *requests,
        ]  # ADDR NETMASK MTU TXQLEN
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for code, value in requests:
            fcntl.ioctl(any_socket, code, struct.pack("16s24s", interface.encode(), value))


def _set_up(name: str, address: str, names: str, private: Iterable[str], interface: str, mtu: int) -> int:
    """Create the namespaces of the calling process 1; returns the TUN device."""
    _call("unshare", _INSIDE)
    _mount("none", "/", None, _PRIVATE)
    _mount("proc", "/proc", "proc")
    _mount("tmpfs", "/dev/shm", "tmpfs")
    Path("/dev/shm/hosts").write_text(names, encoding="utf-8")
    _mount("/dev/shm/hosts", "/etc/hosts", None, _BIND)
    for folder in ("/dev/shm", *private):  # /dev/shm again: ours must not be visible
        _mount("tmpfs", folder, "tmpfs", 0, "mode=1777")
    socket.sethostname(name)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sh22x", interface.encode(), 0x1001))  # TUNSETIFF: IFF_TUN | IFF_NO_PI
    with contextlib.suppress(OSError):
        Path(f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6").write_text("1", encoding="utf-8")
    _switch_on("lo")
    _switch_on(interface, address, mtu)
    return tun


def process_one(report: socket.socket, **host: Any) -> None:
    """Run process 1 of a host until it is killed or the bridge ends. Never returns."""
    try:
        _call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG; if the bridge ended before, the next line fails
        socket.send_fds(report, [b"up"], [_set_up(**host)])
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans of the host leave no zombies
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.closerange(3, 4096)
        while True:
            signal.pause()
    except BaseException as error:
        report.send(str(error).encode() or b"interrupted")
    finally:
        os._exit(1)
