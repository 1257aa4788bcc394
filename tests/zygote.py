"""Many ranks on one machine: forked from one process that has imported everything, 60 MB each in place of 400.

``mpiexec`` must start its ranks itself, so it starts this file as a small stand-in, which hands its own environment and file descriptors
to the warm parent; the parent forks the rank, and the stand-in waits for its exit code.
Test code: the socket lies in a folder of the test, and nobody else speaks on it.
"""

import json
import os
import socket
import sys

FDS = ("PMI_FD",)


def stand_in(address: str) -> int:
    """Ask the warm parent at ``address`` for a rank with this process's environment, and return its exit code."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.connect(address)
        fds = [1, 2, *(int(os.environ[name]) for name in FDS if name in os.environ)]
        wanted = json.dumps(dict(os.environ)).encode()
        socket.send_fds(link, [len(wanted).to_bytes(8, "little")], fds)
        link.sendall(wanted)
        answer = link.recv(8)
        return int.from_bytes(answer, "little") if answer else 1


def accept(server: socket.socket) -> tuple[socket.socket, dict[str, str], list[int]]:
    """Take one stand-in: its link, its rank's environment with the received descriptors in it, and those, to be closed after the fork."""
    link, _ = server.accept()
    head, fds, _, _ = socket.recv_fds(link, 8, 8)
    size, text = int.from_bytes(head, "little"), b""
    while len(text) < size:
        text += link.recv(size - len(text))
    environ = json.loads(text)
    names = [name for name in FDS if name in environ]
    environ |= {name: str(fd) for name, fd in zip(names, fds[2:], strict=True)}
    environ["ZYGOTE_FDS"] = json.dumps(fds[:2])
    return link, environ, fds


if __name__ == "__main__":
    sys.exit(stand_in(sys.argv[1]))
