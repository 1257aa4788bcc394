"""What only GPUs can show: wires and sums that lie on the device, and on the CPU beside an nccl that moves device memory only."""

from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import FileStore

from slora_dist.comm.torch_comm import TorchComm
from tests.ranks import run_ranks

GPUS = torch.cuda.device_count()
BUCKET = 4096
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(GPUS == 0, reason="no CUDA device")]


def _join(rank: int, size: int, folder: Path) -> TorchComm:
    return TorchComm("nccl", rank, size, FileStore(str(folder / "store"), size), 60.0, torch.device("cuda", rank), BUCKET)


def _numbers(index: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that every format here holds exactly, also their sums over ranks."""
    return (torch.arange(3 * BUCKET + 7) % 50 + index).to(dtype)


@pytest.mark.parametrize("place", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_broadcast(place: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run_ranks(min(GPUS, 2), _broadcast, place, dtype, tmp_path)


def _broadcast(rank: int, size: int, place: str, dtype: torch.dtype, folder: Path) -> None:
    comm = _join(rank, size, folder)
    values = (_numbers(3, dtype) if rank == 0 else torch.zeros(3 * BUCKET + 7, dtype=dtype)).to(torch.device(place, rank))
    comm.broadcast(values.view(torch.uint8))
    assert values.device.type == place
    assert torch.equal(values.cpu(), _numbers(3, dtype))
    comm.close()


@pytest.mark.parametrize("place", ["cuda", "cpu"])
@pytest.mark.parametrize("announced", [True, False])
def test_gather_hands_over_on_the_cpu(place: str, announced: bool, tmp_path: Path) -> None:
    run_ranks(min(GPUS, 2), _gather, place, announced, tmp_path)


def _gather(rank: int, size: int, place: str, announced: bool, folder: Path) -> None:
    """Every rank sends two messages in bfloat16, of uneven sizes where they are announced."""
    comm = _join(rank, size, folder)
    senders = [*range(size), *range(size)]
    whole = [_numbers(index, torch.bfloat16).view(torch.uint8) for index in range(len(senders))]
    wires = [wire_B[: wire_B.numel() - index] if announced else wire_B for index, wire_B in enumerate(whole)]
    own = [wire_B.to(torch.device(place, rank)) for wire_B, sender in zip(wires, senders, strict=True) if sender == rank]
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(senders))}
    for index, _, chunk_b in comm.gather(own, senders, None if announced else whole[0].numel()):
        assert chunk_b.device.type == "cpu"
        seen[index].append(chunk_b.clone())
    if rank == 0:
        assert all(torch.equal(torch.cat(chunks), wires[index]) for index, chunks in seen.items())
    comm.close()


@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_reduce(place: str, tmp_path: Path) -> None:
    run_ranks(min(GPUS, 2), _reduce, place, tmp_path)


def _reduce(rank: int, size: int, place: str, folder: Path) -> None:
    comm = _join(rank, size, folder)
    for dtype in (torch.float32, torch.int64):
        values = _numbers(rank, dtype).to(torch.device(place, rank))
        comm.reduce(values)
        assert values.device.type == place
        assert rank or torch.equal(values.cpu(), torch.stack([_numbers(peer, dtype) for peer in range(size)]).sum(0).to(dtype))
    comm.close()
