"""Reading and writing safetensors files.

They hold 8 bytes of header length, a JSON header, then the raw tensors end to end. A
downloaded file is untrusted: its header is checked entry by entry against the file's
size before any tensor is made. Tensors are memory-mapped, so that no rank of a sharded
model ever holds a copy of all of them.
"""

import json
import math
from pathlib import Path

import torch

from data.lib.cli import UserError, replacing
from data.lib.sources import refuse_stand_in

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_HEADER = 100_000_000  # bytes; the safetensors library reads no longer header either
MAX_DIMENSIONS = 8


def write_safetensors(path, shapes: dict, values, dtype: torch.dtype) -> None:
    """Write tensors as `dtype`: `shapes` is {name: shape}, and `values` yields the tensors
    one by one in that order, so that they need not all be in memory."""
    name_of = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": name_of[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # the tensors start at a multiple of 8
    with replacing(path) as temporary, open(temporary, "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for t in values:
            f.write(t.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)


def read_safetensors(path) -> dict[str, torch.Tensor]:
    """All tensors of a file by name, memory-mapped: nothing is read before it is used. Raises UserError
    when the file is missing, cut off or not of this format."""
    path = Path(path)
    refuse_stand_in(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; the model folder is missing or was not finished")
    try:
        header, start = read_header(path)
        return map_tensors(path, header, start)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: damaged ({e}); fetch or make the model again") from None


def read_header(path: Path) -> tuple[dict, int]:
    """The checked entries of a file, and where its first tensor begins; or ValueError."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        if size < 8 or start > min(size, MAX_HEADER):
            raise ValueError("the header is longer than the file, or than any real one")
        header = json.loads(f.read(start - 8))
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        check_entry(name, entry)
    return header, start


def check_entry(name: str, entry) -> None:
    """ValueError for an entry that is not {"dtype": name, "shape": [...], "data_offsets":
    [first, last]}."""
    if not name.isprintable() or not isinstance(entry, dict):
        expected = "the description of a tensor"
        raise ValueError(f"{name!r:.80} is {entry!r:.80}, expected {expected}")
    dtype = entry.get("dtype")
    if dtype not in list(DTYPES):  # a list, because what was read may not be hashable
        supported = ", ".join(DTYPES)
        raise ValueError(f"{name:.80} has dtype {dtype!r:.80}; {supported} are supported")
    shape = entry.get("shape")
    if not whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name:.80}: shape is {shape!r:.80}, expected a few whole numbers")
    offsets = entry.get("data_offsets")
    if not whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{name:.80}: data_offsets is {offsets!r:.80}, expected two whole numbers")


def whole_numbers(value) -> bool:
    """Whether a JSON value is a list of whole numbers (true and false are none)."""
    if not isinstance(value, list):
        return False
    return all(type(n) is int and 0 <= n < 2**60 for n in value)


def map_tensors(path: Path, header: dict, start: int) -> dict[str, torch.Tensor]:
    """The tensors that a checked header describes; ValueError unless they fill the rest of
    the file without gaps."""
    size = path.stat().st_size
    raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = DTYPES[entry["dtype"]]
        shape = entry["shape"]
        first, last = entry["data_offsets"]
        n_bytes = dtype.itemsize * math.prod(shape)
        if first != end or last - first != n_bytes or start + last > size:
            raise ValueError(
                f"{name}: bytes {first} to {last} do not hold {shape} of {entry['dtype']} "
                "right behind the tensor before"
            )
        data = raw[start + first : start + last]
        if (start + first) % 4:  # a view as fp32 must be aligned
            data = data.clone()
        tensors[name] = data.view(dtype).view(shape)
        end = last
    if start + end != size:
        raise ValueError(f"{size} bytes, the header says {start + end}")
    return tensors
