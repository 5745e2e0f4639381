"""The network as far as one machine can tell: its own name, and the port where ranks would meet."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from pathlib import Path

from pipeline.doctor import Check, failed, look, ok, warning

DEFAULT_PORT = 29500
"""torchrun's, where neither --standalone nor --master_port says otherwise."""
_LISTENING = "0A"


def checks(*, under_torchrun: bool, num_machines: int) -> list[Check]:
    """
    Args:
        under_torchrun: the ranks have their meeting point already, and it is torchrun's.
    """
    found = look("host name", host_name, num_machines)
    return found if under_torchrun else found + look("port", port, os.environ.get("MASTER_PORT", ""))


def host_name(num_machines: int = 1, name: str | None = None) -> list[Check]:
    """Whether this machine knows its own address: gloo asks for it at the start."""
    name = socket.gethostname() if name is None else name
    interface = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME with the interface's name (ip -br addr)"
    try:
        known = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError as error:
        found = f"{name} has no address here ({error.strerror}): ranks on several machines would not find each other"
        return [warning("host name", found, f"add it to /etc/hosts, or set {interface}")]
    found = f"{name} is {', '.join(known)}"
    if num_machines > 1 and all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in known):
        found = f"{found}, which other machines cannot reach"
        return [warning("host name", found, f"mend /etc/hosts, or set {interface}")]
    return [ok("host name", found)]


def port(wanted: str = "") -> list[Check]:
    """Whether the ranks' meeting point can be opened here."""
    if wanted and not (wanted.isdigit() and 0 < int(wanted) < 1 << 16):
        return [failed("port", f"MASTER_PORT is {wanted!r}", "unset MASTER_PORT, or a number from 1 to 65535")]
    number = int(wanted or DEFAULT_PORT)
    whence = "MASTER_PORT" if wanted else "torchrun's default"
    try:
        both = socket.has_dualstack_ipv6()  # on all addresses, as torch does
        socket.create_server(
            ("", number), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        ).close()
    except OSError as error:
        who = "; ".join(occupants(number)) or error.strerror or "refused"
        advice = "torchrun --standalone (one machine) or --master_port with another number; or end what holds it"
        return [failed("port", f"{number} ({whence}) cannot be opened: {who}", advice)]
    return [ok("port", f"{number} ({whence}) is free")]


def occupants(number: int, proc: Path = Path("/proc")) -> list[str]:
    """What listens on this port, as far as this user may know: command and process id."""
    inodes: dict[str, str] = {}
    for table in (proc / "net/tcp", proc / "net/tcp6"):
        if not table.exists():
            continue
        for line in table.read_text().splitlines()[1:]:
            words = line.split()
            if int(words[1].rpartition(":")[2], 16) == number and words[3] == _LISTENING:
                inodes[f"socket:[{words[9]}]"] = words[7]
    found = set()
    for process in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            if any(os.readlink(handle) in inodes for handle in (process / "fd").iterdir()):  # noqa: PTH115
                words = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split()
                found.add(f"held by {' '.join(words)[:60]} (pid {process.name})")
    return sorted(found) or [f"held by a process of user {user}" for user in sorted(set(inodes.values()))]
