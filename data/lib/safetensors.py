"""Reading and writing safetensors files: 8 bytes of header length, a JSON header, then the raw tensors end to end.

A downloaded file is untrusted: its header is checked entry by entry against the file's size before any tensor is made. Tensors are
memory-mapped: no rank of a sharded model ever holds a copy of all of them.
"""

import json
import math
from pathlib import Path

import torch

from data.lib.cli import UserError, replacing

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HEADER_BYTES = 100_000_000  # the safetensors library reads no longer header either


def write_safetensors(path, shapes: dict[str, list[int]], values, dtype: torch.dtype) -> None:
    """Write tensors of these shapes as `dtype`, under a temporary name first. `values` gives them one by one, in the order of `shapes`."""
    name_of = {v: k for k, v in DTYPES.items()}[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": name_of, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for t in values:
            f.write(t.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)


def read_safetensors(path) -> dict[str, torch.Tensor]:
    """All tensors of a file, memory-mapped: nothing is read before it is used. UserError when it is missing, cut off or not of that format."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; the model folder is missing or was not finished")
    size = path.stat().st_size
    try:
        with open(path, "rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            if size < 8 or start > min(size, HEADER_BYTES):
                raise ValueError("the header is longer than the file, or than any real one")
            header = json.loads(f.read(start - 8))
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
        header.pop("__metadata__", None)
        for name, t in header.items():
            check_entry(name, t)
        raw, tensors, end = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8), {}, 0
        for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (first, last) = DTYPES[t["dtype"]], t["shape"], t["data_offsets"]
            if first != end or last - first != dtype.itemsize * math.prod(shape) or start + last > size:
                raise ValueError(f"{name}: bytes {first} to {last} do not hold {shape} of {t['dtype']} right behind the tensor before")
            data = raw[start + first : start + last]
            tensors[name] = (data if (start + first) % 4 == 0 else data.clone()).view(dtype).view(shape)
            end = last
        if start + end != size:
            raise ValueError(f"{size} bytes, the header says {start + end}")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: damaged ({e}); fetch or make the model again") from None
    return tensors


def check_entry(name: str, t) -> None:
    """ValueError for a header entry that is not {"dtype": name, "shape": [...], "data_offsets": [first, last]}."""
    if not name.isprintable() or not isinstance(t, dict):
        raise ValueError(f"{name!r:.80} is {t!r:.80}, expected the description of a tensor")
    if t.get("dtype") not in (*DTYPES,):
        raise ValueError(f"{name:.80} has dtype {t.get('dtype')!r:.80}; {', '.join(DTYPES)} are supported")
    for key, most in (("shape", 8), ("data_offsets", 2)):
        numbers = t.get(key)
        whole_numbers = isinstance(numbers, list) and len(numbers) <= most and all(type(n) is int and 0 <= n < 2**60 for n in numbers)
        if not whole_numbers or key == "data_offsets" and len(numbers) != 2:
            raise ValueError(f"{name:.80}: {key} is {numbers!r:.80}, expected {'two' if most == 2 else 'a few'} whole numbers")
