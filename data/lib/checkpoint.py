"""Checkpoints of a training run (torch.distributed.checkpoint): written whole or not at all, read by any number of ranks."""

import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from data.lib.cli import UserError
from data.lib.ranks import add_up, rank, world

# -------------------------------------------------------------------------------------------- checkpoints


def training_state(model, optimizers) -> dict:
    """Everything that a step changes, as named tensors (sharded under FSDP)."""
    names = {p: name for name, p in model.named_parameters()}
    state = {f"model.{name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        state |= {f"optimizer.{names[p]}.{key}": value for p, values in optimizer.state.items() for key, value in values.items()}
    return state


def checkpoint_library():
    """torch.distributed.checkpoint, imported when it is first needed, and quiet about there being one device only."""
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", message="torch.distributed is")
    return dcp


def checkpoints(out_dir: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(path for path in (out_dir / "checkpoints").glob("*") if path.name.isdigit())


def save_checkpoint(out_dir: Path, model, optimizers, step: int, tokens: int, seconds: float, keep: int) -> None:
    """Write checkpoints/STEP under a temporary name, rename it, and drop all but the newest `keep`. All ranks call this."""
    dcp = checkpoint_library()
    path = out_dir / "checkpoints" / f"{step:08d}"
    temporary = path.with_name(path.name + ".tmp")
    state = training_state(model, optimizers) | {"progress": torch.tensor([step, tokens, seconds], dtype=torch.float64)}
    try:
        if rank() == 0:
            for left in path.parent.glob("*.tmp"):  # by a run that was killed
                shutil.rmtree(left)
            temporary.mkdir(parents=True)
        dcp.save(state, checkpoint_id=temporary, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as e:
        [error, _] = next(iter(e.failures.values()))
        raise UserError(f"{temporary}: cannot be written ({str(error).splitlines()[0]}); the same command goes on from the one before") from None
    if rank() == 0:
        os.rename(temporary, path)
        for old in checkpoints(out_dir)[:-keep]:
            os.rename(old, old.with_name(old.name + ".tmp"))  # never half a checkpoint under a final name
            shutil.rmtree(old.with_name(old.name + ".tmp"))


def load_checkpoint(out_dir: Path, model, optimizers) -> tuple[int, int, float]:
    """(step, tokens, seconds) of the newest checkpoint, which is read into model and optimisers; zeros without one. Any number of ranks."""
    [newest] = add_up(max((int(path.name) for path in checkpoints(out_dir)), default=0) if rank() == 0 else 0)  # the first rank decides
    if not newest:
        return 0, 0, 0.0
    dcp = checkpoint_library()
    path = out_dir / "checkpoints" / f"{newest:08.0f}"
    if add_up(path.exists())[0] < world():
        raise UserError(f"{path}: not there on every machine; --out_dir must be on a file system that all of them share")
    state = training_state(model, optimizers) | {"progress": torch.zeros(3, dtype=torch.float64)}
    try:
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (Exception, dcp.CheckpointException) as e:  # the latter is no Exception; a damaged file can fail in a dozen ways
        raise UserError(f"{path}: damaged ({type(e).__name__}); remove it to go on from the one before, or from the start") from None
    step, tokens, seconds = state["progress"].tolist()
    return int(step), int(tokens), seconds
