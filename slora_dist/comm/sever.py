"""Cutting a process group's connections from another thread: the only way to wake who waits in a collective of gloo.

gloo has no call for it. But a connection that is shut down raises in whoever waits on it, here and at its other end, at once. Which
connections are the group's is read from the list of open files: those that were opened while it was formed. Linux only.
"""

import os
import socket
from pathlib import Path

FILES = Path("/proc/self/fd")


def sockets() -> dict[str, int]:
    """Return {name: descriptor} of all sockets that this process has open; a name is never used twice."""
    found = {}
    for file in FILES.iterdir():
        try:
            name = str(file.readlink())
        except OSError:  # closed meanwhile
            continue
        if name.startswith("socket:"):
            found[name] = int(file.name)
    return found


def sever(names: set[str], spared: set[int]) -> None:
    """Shut down those of the named sockets that are TCP connections; descriptors in ``spared`` are left alone."""
    for name, descriptor in sockets().items():
        if name in names and descriptor not in spared:
            try:
                with socket.socket(fileno=os.dup(descriptor)) as twin:
                    if twin.type == socket.SOCK_STREAM and twin.family in (socket.AF_INET, socket.AF_INET6):
                        twin.getpeername()  # raises for a socket that listens: gloo would not survive its end
                        twin.shutdown(socket.SHUT_RDWR)
            except OSError:  # not connected, or closed meanwhile
                continue
