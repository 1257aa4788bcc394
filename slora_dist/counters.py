"""What the kernel counted: bytes of this process's own TCP connections, and of the interfaces of its host.

The ledger says what was handed to the transport; these figures come from below it, so that each can witness the other. Connections are the
process's own and do not mix with what others send; interfaces count everything, with the headers of every frame. Linux only: elsewhere,
and where a file cannot be read, there is nothing to tell.
"""

import os
import socket
import stat
import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

Counts = dict[str, int]
_TCP_INFO_BYTES = 256
_ACKED_RECEIVED_SEGMENTS = struct.Struct("=QQII")  # tcpi_bytes_acked, tcpi_bytes_received, tcpi_segs_out, tcpi_segs_in
_AT = 120  # where they stand in the kernel's struct tcp_info (linux/tcp.h; fields are only ever added behind)
_NAMES = ("sent_bytes", "received_bytes", "segments_out", "segments_in")
_INFINIBAND_WORD = 4  # port_rcv_data and port_xmit_data count words of four bytes


def connections(beside: Collection[int] = ()) -> dict[str, Counts]:
    """Return {socket: {sent_bytes, received_bytes, segments_out, segments_in}} of every TCP connection that this process has open.

    ``beside`` are descriptors of those that are left out.
    """
    found = {}
    for descriptor in set(_descriptors()).difference(beside):
        try:
            about = os.fstat(descriptor)
            if stat.S_ISSOCK(about.st_mode) and (counts := _connection(descriptor)):
                found[f"socket:[{about.st_ino}]"] = counts
        except OSError:  # closed meanwhile, or not of a kind that has such counters
            continue
    return found


def _descriptors() -> list[int]:
    try:
        with os.scandir("/proc/self/fd") as found:
            return [int(entry.name) for entry in found]
    except OSError:
        return []


def _connection(descriptor: int) -> Counts | None:
    lent = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, descriptor)  # if it is no TCP, the kernel will say so
    try:
        info = lent.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    finally:
        lent.detach()  # another's descriptor stays open
    if len(info) < _AT + _ACKED_RECEIVED_SEGMENTS.size:
        return None
    return dict(zip(_NAMES, _ACKED_RECEIVED_SEGMENTS.unpack_from(info, _AT), strict=True))


def interfaces(table: Path = Path("/proc/net/dev")) -> dict[str, Counts]:
    """Return {interface: {rx_bytes, tx_bytes}} of this network namespace."""
    try:
        rows = [line.partition(":") for line in table.read_text(encoding="ascii").splitlines()[2:]]
    except OSError:
        return {}
    return {name.strip(): {"rx_bytes": int(counts.split()[0]), "tx_bytes": int(counts.split()[8])} for name, _, counts in rows}


def infiniband(root: Path = Path("/sys/class/infiniband")) -> dict[str, Counts]:
    """Return {device/port: {rx_bytes, tx_bytes}} of this machine's InfiniBand ports."""
    ports = sorted(root.glob("*/ports/*/counters")) if root.is_dir() else []
    return {f"{port.parts[-4]}/{port.parts[-2]}": _words(port) for port in ports}


def _words(port: Path) -> Counts:
    files = {"rx_bytes": "port_rcv_data", "tx_bytes": "port_xmit_data"}
    try:
        return {name: _INFINIBAND_WORD * int((port / file).read_text()) for name, file in files.items()}
    except (OSError, ValueError):
        return {}


class Counters:
    """Differences of the kernel's counters from one reading to the next; connections that are ``beside`` the transport are not read."""

    def __init__(self, beside: Callable[[], Collection[int]] = tuple) -> None:
        self._beside = beside
        self._last = _read(beside())

    def since(self) -> dict[str, dict[str, Counts] | Counts]:
        """Return what was counted since the last reading: ``{tcp: sums over connections, interfaces: {...}, infiniband: {...}}``."""
        now, last = _read(self._beside()), self._last
        self._last = now
        moved = {group: {name: _less(counts, last[group].get(name, {})) for name, counts in now[group].items()} for group in now}
        tcp = {name: sum(counts.get(name, 0) for counts in moved["tcp"].values()) for name in _NAMES}
        return {"tcp": tcp, "interfaces": moved["interfaces"], "infiniband": moved["infiniband"]}


def _read(beside: Collection[int]) -> dict[str, dict[str, Counts]]:
    return {"tcp": connections(beside), "interfaces": interfaces(), "infiniband": infiniband()}


def _less(now: Mapping[str, int], before: Mapping[str, int]) -> Counts:
    return {name: count - before.get(name, 0) for name, count in now.items()}


def place() -> str:
    """Return a name for the network stack that this process counts in: two processes with the same one see the same interfaces."""
    try:
        return f"{machine()}/{Path('/proc/self/ns/net').readlink()}"
    except OSError:
        return machine()


def machine() -> str:
    """Return a name for the running system: processes with the same one share its monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
