"""Whose a file, a folder or a connection is: what others could have written is not believed."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from pathlib import Path


def is_ours(info: os.stat_result) -> bool:
    """Whether a file belongs to this user, or to root: what others wrote is not believed."""
    return info.st_uid in (os.geteuid(), 0)


def make_private(folder: Path) -> None:
    """A folder that others cannot enter; one that is there keeps its readers, but no other may write."""
    if folder.is_dir():
        mode = folder.stat().st_mode
        if mode & 0o022:
            folder.chmod(mode & 0o7755)
    else:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


_ESTABLISHED = 1
_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, _NO_COOKIE = 4, 20, 1, 0xFFFFFFFF
_REQUEST = struct.Struct("=IHHII BBBBI")
"""linux/netlink.h's nlmsghdr, and linux/inet_diag.h's inet_diag_req_v2 up to its id."""
_ANSWER = struct.Struct("=IHHII BBBB 48x 12x II")
"""nlmsghdr, and inet_diag_msg: family, state, timer, retransmissions, id, three counts, user, inode."""


def user_of_connection(end: tuple[str, int], other: tuple[str, int]) -> int | None:
    """The user whose process holds this end (host and port) of a TCP connection of this machine.

    None where there is no such connection, or no process holds it any more.
    """
    found = _asked(end, other)
    if found is None:
        found = _looked_up(end, other)
    state, user, inode = found or (0, 0, 0)
    return user if state == _ESTABLISHED and inode else None  # closed by its process, it has inode 0


def _asked(end: tuple[str, int], other: tuple[str, int]) -> tuple[int, int, int] | None:
    """State, user and inode of a socket as the kernel answers for it alone; None where it does not (tcp_diag)."""
    family = socket.AF_INET6 if ":" in end[0] else socket.AF_INET
    ports = struct.pack("!HH", end[1], other[1])
    hosts = b"".join(ipaddress.ip_address(host).packed.ljust(16, b"\0") for host, _ in (end, other))
    name = ports + hosts + struct.pack("=III", 0, _NO_COOKIE, _NO_COOKIE)
    size = _REQUEST.size + len(name)
    head = _REQUEST.pack(
        size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0, family, socket.IPPROTO_TCP, 0, 0, 1 << _ESTABLISHED
    )
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as kernel:
            kernel.settimeout(1.0)
            kernel.send(head + name)
            answer = kernel.recv(4096)
    except OSError:
        return None
    if len(answer) < _ANSWER.size or struct.unpack_from("=H", answer, 4)[0] != _SOCK_DIAG_BY_FAMILY:
        return None
    *_, state, _, _, user, inode = _ANSWER.unpack_from(answer)
    return state, user, inode


def _looked_up(end: tuple[str, int], other: tuple[str, int]) -> tuple[int, int, int] | None:
    """The same from the table of all sockets, which takes as long as that is."""
    ends = [f"{_kernel_address(host)}:{port:04X}" for host, port in (end, other)]
    table = Path("/proc/net/tcp6" if ":" in end[0] else "/proc/net/tcp")
    for line in table.read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == ends:
            return int(fields[3], 16), int(fields[7]), int(fields[9])
    return None


def _kernel_address(host: str) -> str:
    """An address as in /proc/net/tcp: hexadecimal, each four bytes in this machine's order."""
    packed = ipaddress.ip_address(host).packed
    return b"".join(packed[at : at + 4][::-1] for at in range(0, len(packed), 4)).hex().upper()
