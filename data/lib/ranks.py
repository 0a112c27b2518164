"""Devices, the processes of torchrun (ranks), and parameters that are sharded over them."""

import os
import sys

import torch
import torch.distributed as dist

from data.lib.cli import UserError

# ---- ranks

TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets beside WORLD_SIZE


def rank() -> int:
    """The number of this process; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(*values: float) -> list[float]:
    """The sum of each value over all ranks, in float64. All ranks must call this."""
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = total.to(device)
        dist.all_reduce(total)
    return total.tolist()


def join_ranks(device: str) -> str:
    """The device of this process. Under torchrun it also joins the other ranks, and all but the first
    become quiet. Raises UserError for a device that is not there, and for variables that are no
    torchrun's."""
    if "WORLD_SIZE" not in os.environ:
        return pick_device(device)
    missing = ", ".join(name for name in TORCHRUN if not os.environ.get(name))
    if missing:
        raise UserError(f"WORLD_SIZE is set, but not {missing}: start by torchrun, or unset WORLD_SIZE")
    if device.startswith("cuda:"):
        raise UserError(f"--device={device}: torchrun gives each process one; leave it out, or say cuda")
    device = own_device(device)
    try:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    except (ValueError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"the ranks cannot meet ({reason}): start by torchrun, or unset WORLD_SIZE") from None
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def pick_device(name: str) -> str:
    """The device asked for by --device, or the best there is; UserError if it is not there."""
    if name:
        try:
            torch.zeros(1, device=name)
        except (RuntimeError, AssertionError) as e:
            reason = str(e).splitlines()[0]
            raise UserError(f"--device={name}: {reason}") from None
        return name
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def own_device(name: str) -> str:
    """The same under torchrun, where each process has a GPU of its own."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available() and name in ("", "cuda"):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(name)
    if device.startswith("cuda:"):  # a plain "cuda" has no number, which torch refuses
        torch.cuda.set_device(device)
    return device


def worker_device(name: str) -> str:
    """The device of this process, by --device. Each rank of torchrun is a worker with a GPU of its own;
    one of them speaks."""
    if "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")
    device = own_device(name)
    # The engine adds up in float64, which mps lacks.
    return "cpu" if device == "mps" and not name else device


# ---- sharded parameters


def is_sharded(p: torch.Tensor) -> bool:
    """Whether FSDP has made a DTensor of p, of which each rank holds some rows."""
    return hasattr(p, "device_mesh")


def shard_offset(p) -> int:
    """The first row of a sharded parameter that this rank holds. fully_shard cuts dimension 0 as
    torch.chunk does: all shards but the last ones have ceil(rows / shards) rows."""
    [axis] = [i for i, placement in enumerate(p.placements) if placement.is_shard()]
    rows = -(-len(p) // p.device_mesh.size(axis))
    return min(len(p), p.device_mesh.get_local_rank(axis) * rows)


@torch.no_grad()
def put(p: torch.Tensor, value: torch.Tensor, first: int = 0) -> None:
    """Copy value into the rows of parameter p from row `first` on. If p is sharded, each
    rank copies what falls into its own rows."""
    offset = shard_offset(p) if is_sharded(p) else 0
    local = p.to_local() if is_sharded(p) else p
    low = max(first, offset)
    high = min(first + len(value), offset + len(local))
    if low < high:
        local[low - offset : high - offset].copy_(value[low - first : high - first])


def whole(p: torch.Tensor) -> torch.Tensor:
    """A parameter on the CPU, gathered from all ranks if it is sharded. All must call this."""
    p = p.detach()
    return (p.full_tensor() if is_sharded(p) else p).cpu()
