"""Devices, the ranks of torchrun, and parameters that are sharded over them."""

import os
import sys

import torch
import torch.distributed as dist

from data.lib.cli import UserError


@torch.no_grad()
def put(p: torch.Tensor, value: torch.Tensor, first: int = 0) -> None:
    """Copy rows into parameter p from row `first` on: into the rank's own rows of it, if p is sharded."""
    offset, local = (0, p) if not hasattr(p, "device_mesh") else (shard_offset(p), p.to_local())
    low, high = max(first, offset), min(first + len(value), offset + len(local))
    if low < high:
        local[low - offset : high - offset].copy_(value[low - first : high - first])


def whole(p: torch.Tensor) -> torch.Tensor:
    """A parameter on the CPU, gathered from all ranks if it is sharded (all must call this)."""
    p = p.detach()
    return (p.full_tensor() if hasattr(p, "device_mesh") else p).cpu()


def shard_offset(p) -> int:
    """First row of a sharded parameter that this rank holds (fully_shard cuts dimension 0 as torch.chunk does)."""
    [axis] = [i for i, placement in enumerate(p.placements) if placement.is_shard()]
    return min(len(p), p.device_mesh.get_local_rank(axis) * -(-len(p) // p.device_mesh.size(axis)))


def pick_device(name: str) -> str:
    if name:
        try:
            torch.zeros(1, device=name)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device={name}: {str(e).splitlines()[0]}") from None
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# ------------------------------------------------------------------------------------------ several devices


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks(device: str) -> str:
    """Under torchrun: join the other ranks, and keep all but the first quiet. The device of this rank."""
    if "WORLD_SIZE" not in os.environ:
        return pick_device(device)
    if device.startswith("cuda:"):
        raise UserError(f"--device={device}: torchrun gives each process a device; leave it out, or --device=cuda")
    if torch.cuda.is_available() and device in ("", "cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    device = pick_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def add_up(*values: float) -> list[float]:
    """Sums over all ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        total = total.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(total)
    return total.tolist()
