"""One rank of NCCL: the process group bound to its device, and a collective."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist

from megaforge.parallel.distributed import connect

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or dist.is_initialized(), reason="needs a GPU")


def test_a_group_of_one_connects() -> None:
    device = torch.device("cuda", 0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1, device_id=device)
    try:
        connect([dist.group.WORLD], device)
        value = torch.full((3,), 2.0, device=device)
        dist.all_reduce(value)
        assert value.tolist() == [2.0, 2.0, 2.0]
    finally:
        dist.destroy_process_group()
