"""The kernel's counters against bytes that this test sends."""

import socket
from pathlib import Path

from slora_dist.counters import Counters, infiniband, interfaces, place


def test_the_bytes_of_own_connections_are_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        counters = Counters()
        client.sendall(b"x" * 10_000)
        received = 0
        while received < 10_000:
            received += len(accepted.recv(10_000))
        tcp = counters.since()["tcp"]
        accepted.close()
    assert tcp["received_bytes"] == 10_000 and tcp["sent_bytes"] in (10_000, 0)  # the acknowledgement may be on its way
    assert tcp["segments_in"] > 0


def test_connections_beside_the_transport_are_not_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        counters = Counters(lambda: {client.fileno(), accepted.fileno()})
        client.sendall(b"x" * 100)
        assert len(accepted.recv(100)) == 100
        assert not any(counters.since()["tcp"].values())
        accepted.close()


def test_reading_takes_no_descriptor_and_forgets_what_was_counted() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    counters = Counters()
    counters.since()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert counters.since()["tcp"] == {"sent_bytes": 0, "received_bytes": 0, "segments_out": 0, "segments_in": 0}


def test_interfaces_are_those_that_the_kernel_has(tmp_path: Path) -> None:
    assert set(interfaces()["lo"]) == {"rx_bytes", "tx_bytes"}
    assert interfaces(tmp_path / "none") == {}
    assert place() == place() != ""


def test_infiniband_counts_words_of_four_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "mlx5_0" / "ports" / "1" / "counters"
    folder.mkdir(parents=True)
    (folder / "port_rcv_data").write_text("25\n")
    (folder / "port_xmit_data").write_text("10\n")
    assert infiniband(tmp_path) == {"mlx5_0/1": {"rx_bytes": 100, "tx_bytes": 40}}
