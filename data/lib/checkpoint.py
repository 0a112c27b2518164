"""Checkpoints of a training run: written whole or not at all, read by any number of ranks.

torch.distributed.checkpoint writes them, so each rank saves its own shards. They hold
weights, optimiser state and the step. Whatever is random in training is a function of the
seed and the step, so nothing else is needed to go on exactly.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from data.lib.cli import UserError
from data.lib.ranks import add_up, rank, world

KEEP = 2  # how many of the newest checkpoints are kept


class Position(NamedTuple):
    """How far a run has come."""

    step: int = 0
    tokens: int = 0  # that it has trained on
    seconds: float = 0.0  # that it has taken, before an interruption, too


def training_state(model, optimizers) -> dict[str, torch.Tensor]:
    """Everything that a step changes, by name; sharded tensors under FSDP."""
    names = {p: name for name, p in model.named_parameters()}
    state = {f"model.{name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        for p, values in optimizer.state.items():
            for key, value in values.items():
                state[f"optimizer.{names[p]}.{key}"] = value
    return state


def checkpoint_library():
    """torch.distributed.checkpoint, imported only where it is needed because that takes
    a while. It warns when there is one process only, which is fine here."""
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", message="torch.distributed is")
    return dcp


def checkpoints(out_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    paths = (out_dir / "checkpoints").glob("*")
    return sorted(path for path in paths if path.name.isdigit())


def save_checkpoint(out_dir: Path, model, optimizers, position: Position) -> None:
    """Write checkpoints/STEP and drop all but the KEEP newest. All ranks call this. The folder has a
    temporary name until it is complete. Raises UserError if it cannot be written."""
    dcp = checkpoint_library()
    path = out_dir / "checkpoints" / f"{position.step:08d}"
    temporary = path.with_name(path.name + ".tmp")
    state = training_state(model, optimizers)
    state["progress"] = torch.tensor(position, dtype=torch.float64)
    try:
        if rank() == 0:
            for left in path.parent.glob("*.tmp"):  # by a run that was killed
                shutil.rmtree(left)
            temporary.mkdir(parents=True)
        dcp.save(state, checkpoint_id=temporary, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as e:
        error, _ = next(iter(e.failures.values()))
        reason = str(error).splitlines()[0]
        how = "the same command goes on from the checkpoint before"
        raise UserError(f"{temporary}: cannot be written ({reason}); {how}") from None
    if rank() == 0:
        os.rename(temporary, path)
        for old in checkpoints(out_dir)[:-KEEP]:
            # Renamed first, so that half a checkpoint never stands under a final name.
            doomed = old.with_name(old.name + ".tmp")
            os.rename(old, doomed)
            shutil.rmtree(doomed)


def load_checkpoint(out_dir: Path, model, optimizers) -> Position:
    """Read the newest checkpoint into model and optimisers; zeros if there is none. The number of ranks
    may differ from the one that saved it. Raises UserError if the checkpoint is damaged or is not seen
    by every machine."""
    steps = [int(path.name) for path in checkpoints(out_dir)] if rank() == 0 else []
    [newest] = add_up(max(steps, default=0))  # the first rank decides for all
    if not newest:
        return Position()
    dcp = checkpoint_library()
    path = out_dir / "checkpoints" / f"{newest:08.0f}"
    if add_up(path.exists())[0] < world():
        raise UserError(
            f"{path}: not there on every machine; "
            "--out_dir must be on a file system that all of them share"
        )
    state = training_state(model, optimizers)
    state["progress"] = torch.zeros(3, dtype=torch.float64)
    try:
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (Exception, dcp.CheckpointException) as e:
        # A damaged file can fail in a dozen ways, and CheckpointException is no Exception.
        raise UserError(
            f"{path}: damaged ({type(e).__name__}); "
            "remove it to go on from the one before, or from the start"
        ) from None
    step, tokens, seconds = state["progress"].tolist()
    return Position(int(step), int(tokens), seconds)
