"""tests/gpu.sh without a GPU: its limits of time, the packing of weights, and what the code it runs must not
do on a device: wait for it within a step, or capture into a pool of memory that is dead."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(ROOT / "tests"))

import gpu_stages
import gpu_words
from gpu_report import Report, plain

from data.lib.cli import UserError
from data.lib.engine import Engine, Layout, Runner, Sampling, Shape
from infer_thoughts import sample_slowly


def test_the_end_of_the_time_loses_only_what_is_left(tmp_path):
    """The first stage is cut off in a rehearsal of 20 seconds: its JSON is there and says so."""
    env = {"SECONDS_IN_ALL": "20", "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    env |= {"WORK": str(tmp_path / "work"), "OMP_NUM_THREADS": "1"}
    command = [ROOT / "tests/gpu.sh", "--rehearse", "--stages=right"]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120)
    found = json.loads((tmp_path / "out/right.json").read_text())
    assert done.returncode == 1 and "failed: right" in done.stdout, done.stdout + done.stderr
    assert "time" in found["errors"] and not found["complete"] and found["rehearsal"]
    assert torch.__version__.startswith(found["versions"]["torch"]) and found["seconds"]["all"] < 20


def test_a_part_that_fails_is_kept_and_the_others_go_on(tmp_path):
    report = Report(tmp_path / "stage.json", 60, "cpu", True)
    with report.part("one"):
        raise ValueError("broken here")
    with report.part("two"):
        report.put("found", {"nan": float("nan"), "array": np.arange(2), "tensor": torch.ones(1)})
    report.skip("three", needs=1000)
    kept = json.loads((tmp_path / "stage.json").read_text())
    assert "broken here" in kept["errors"]["one"] and "test_gpu_script" in kept["errors"]["one"]
    assert str(ROOT) not in kept["errors"]["one"], "a path of one machine"
    assert kept["found"]["found"] == {"nan": "nan", "array": [0, 1], "tensor": [1.0]}
    assert plain(report.record["skipped"]).keys() == {"three"}


def test_a_pick_beside_a_border_is_told_from_a_wrong_one(toy_model):
    """0 for what the slow sampler draws, a rounding's width beside a border; large for any other token."""
    sampling = Sampling(6, frozenset())
    drawn, _, _ = sample_slowly(toy_model, [1, 5, 6], sampling, 2, 1)
    wrong = [*drawn[:3], (drawn[3] + 3) % toy_model.config.n_vocab]
    assert gpu_stages.beside_border(toy_model, [1, 5, 6], sampling, (2, 1), drawn[:4], wrong) == 0
    assert gpu_stages.beside_border(toy_model, [1, 5, 6], sampling, (2, 1), wrong, drawn[:4]) > 1e-4


@pytest.fixture
def packed(tmp_path):
    """A model folder of random bf16 bytes and a file of data, in parts of 1,000 bytes."""
    model, data = tmp_path / "model", tmp_path / "data"
    (data / "word").mkdir(parents=True)
    model.mkdir()
    weights = torch.randn(1501).bfloat16().view(torch.uint8).numpy().tobytes() + b"odd"
    (model / "model.safetensors").write_bytes(weights)
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text('{"a": "é"}')
    (data / "word/train.jsonl").write_text("{}\n")
    where = {"pack": str(model), "data": str(data), "out_dir": str(tmp_path / "parts")}
    gpu_words.pack(gpu_words.Settings(**where, part_bytes=1000))
    return tmp_path


def test_weights_travel_in_parts_and_come_out_as_they_went_in(packed):
    parts = sorted((packed / "parts").glob("part-*"))
    assert len(parts) == 3 and max(path.stat().st_size for path in parts) == 1000
    gpu_words.join(packed / "parts", packed / "joined")
    for name in ("model/model.safetensors", "model/tokenizer.json", "data/word/train.jsonl"):
        assert (packed / "joined" / name).read_bytes() == (packed / name).read_bytes(), name


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_parts_that_are_missing_or_damaged_are_named(packed, part, harm):
    path = packed / f"parts/part-{part}"
    says = f"part-{part} missing" if harm == "missing" else "is damaged"
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=says):
        gpu_words.join(packed / "parts", packed / "joined")


class Waits(TorchDispatchMode):
    """Notes operations whose result the host must know before it can go on, or that bring a host's
    number to the device: a captured graph may hold none, and elsewhere each one lets a GPU idle."""

    NAMES = ("item", "_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        indexed = name in ("index", "index_put_", "index_put") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if indexed or name in self.NAMES:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_a_step_and_scores_never_wait_for_the_device(toy_model):
    """On a CPU the same operations run as on a GPU, but for those of attention()."""
    engine = Engine(toy_model)
    runner = engine.runner
    runner.allocate(Layout(n_slots=3, prompt_len=8, max_new=8, lanes=2))
    sampling = Sampling(8, frozenset({5}))
    runner.stops[sampling.stop] = torch.tensor([5])
    toy_model(torch.zeros(1, 2, dtype=torch.long))  # the first forward pass makes rope's frequencies
    lengths = np.array([5, 3, 2, 4])
    attend = engine.attend_rows(np.cumsum(lengths) - lengths, lengths, np.array([6, 2, 0, 1]), [1, 2, 1, 2])
    ids = torch.zeros(int(lengths.sum()), dtype=torch.long)
    with Waits() as waits:
        runner.decode(Shape(n_lanes=4, n_slots=3, prompt_len=8, own_len=4), sampling)
        runner.forward(ids, ids, attend)
    assert waits.found == []
    with Waits() as waits:  # what it looks for is found
        ids[ids > 0].sum().item()
    assert len(waits.found) == 2


def test_graphs_are_never_captured_into_a_dead_pool(toy_model, monkeypatch):
    """torch refuses a pool of which all graphs are gone, so each release() takes a new one."""
    handles = iter([(0, n) for n in range(9)])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    runner = Runner(toy_model)
    runner.on_cuda = True
    seen = []
    for _ in range(3):
        runner.release()
        seen.append(runner.graph_pool)
    assert len(set(seen)) == 3


@pytest.mark.skipif(not (SHARED / "data/word").is_dir(), reason="../shared is absent: no problems")
def test_the_real_problems_are_packed_beside_the_weights(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    files = gpu_words.files_to_pack(gpu_words.Settings(pack=str(model)))
    assert {f"data/{name}" for name in gpu_words.DATA} <= {*files}
    assert Path(files["data/word/train.jsonl"]).exists()
    missing = SimpleNamespace(pack=str(tmp_path), data=str(tmp_path))
    with pytest.raises(UserError, match="config.json is missing"):
        gpu_words.files_to_pack(missing)
