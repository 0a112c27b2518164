"""Several processes on one CPU (gloo) do what one does: FSDP2, HSDP, Muon on sharded matrices, validation, checkpoints for another number."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

SIZES = ["--n_layer=2", "--n_embd=64", "--n_head=4", "--n_kv_head=2", "--batch_size=8", "--max_steps=50", "--log_every=1", "--save_every=10"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def launch(digits, out, n: int, *flags) -> subprocess.Popen:
    """train.py on n processes."""
    start = [sys.executable] if n == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    data = [f"--corpus={digits}/warm", f"--thoughts={digits}/warm_thoughts", f"--val_corpus={digits}/heldout", "--val_rows=19", "--val_every=25"]
    command = [*start, str(ROOT / "train.py"), *data, *SIZES, f"--out_dir={out}", "--device=cpu", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)


def finish(child: subprocess.Popen, code: int = 0) -> str:
    out, err = child.communicate(timeout=240)
    assert child.returncode == code, out + err
    return out + err


def curve(out) -> dict[str, dict[int, float]]:
    """{"loss", "grad_norm", "val_loss": {step: value}} of a run; a step that was done twice counts with its last value."""
    found = {"loss": {}, "grad_norm": {}, "val_loss": {}}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for key in found:
            if key in record:
                found[key][record["step"]] = record[key]
    assert len(found["loss"]) == 50 and len(found["val_loss"]) == 2
    return found


def assert_equal_curves(a, b, within=1e-4):
    for key in ("loss", "val_loss"):
        assert curve(a)[key] == pytest.approx(curve(b)[key], abs=within), key
    assert curve(a)["grad_norm"] == pytest.approx(curve(b)["grad_norm"], rel=0.01)


ADAMW = ["--optimizer=adamw", "--lr=2e-3"]
PACKED = ["--attention=packed", "--seq_len=64"]
WAYS = {
    "padded adamw": ADAMW,
    "packed adamw": [*ADAMW, *PACKED],
    "document muon": ["--attention=document", "--seq_len=64", "--muon_lr=0.01"],
    "packed adamw untied recompute": [*ADAMW, *PACKED, "--tie_embeddings=false", "--recompute"],
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one_that_accumulates(digits, tmp_path, way):
    finish(launch(digits, tmp_path / "one", 1, "--micro_batch=2", *WAYS[way]))
    text = finish(launch(digits, tmp_path / "two", 2, "--micro_batch=2", *WAYS[way]))
    assert "2 x 2 on each of 2 x cpu" in text and text.count("tokens of text") == 1  # one rank speaks
    assert_equal_curves(tmp_path / "one", tmp_path / "two", 1e-3 if "muon" in way else 1e-4)
    a, b = (read_safetensors(tmp_path / f"{name}/model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() < 0.05 for k in a)


def test_hsdp_two_by_two_equals_one_process(digits, tmp_path):
    finish(launch(digits, tmp_path / "one", 1, "--micro_batch=1", *ADAMW, *PACKED))
    finish(launch(digits, tmp_path / "four", 4, "--micro_batch=1", "--replicas=2", *ADAMW, *PACKED))
    assert_equal_curves(tmp_path / "one", tmp_path / "four")


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2)])
def test_resume_on_another_number_of_processes(digits, tmp_path, before, after):
    flags = [*ADAMW, *PACKED, "--micro_batch=2"]
    finish(launch(digits, tmp_path / "whole", 1, *flags))
    child = launch(digits, tmp_path / "cut", before, *flags)
    folder = tmp_path / "cut/checkpoints"
    while not list(folder.glob("*[0-9]")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)  # torchrun hands it to its workers, which save and leave
    _, err = child.communicate(timeout=120)
    assert "saved step" in err and not (tmp_path / "cut/config.json").exists()
    step = max(int(path.name) for path in folder.glob("*[0-9]"))
    assert f"from step {step}" in finish(launch(digits, tmp_path / "cut", after, *flags))
    assert_equal_curves(tmp_path / "whole", tmp_path / "cut")


def test_bf16_on_two_processes_is_near_bf16_on_one(digits, tmp_path):
    flags = [*ADAMW, *PACKED, "--micro_batch=2", "--dtype=bfloat16"]
    finish(launch(digits, tmp_path / "one", 1, *flags))
    finish(launch(digits, tmp_path / "two", 2, *flags))
    assert_equal = [curve(tmp_path / name)["loss"] for name in ("one", "two")]
    assert assert_equal[0] == pytest.approx(assert_equal[1], abs=0.05)
    tensors = read_safetensors(tmp_path / "two/model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_a_batch_that_cannot_be_shared_is_refused(digits, tmp_path):
    assert "--replicas=3 does not divide the 2 devices" in finish(launch(digits, tmp_path / "m", 2, "--replicas=3"), code=1)
    assert "--batch_size=1: fewer rows" in finish(launch(digits, tmp_path / "m", 2, "--batch_size=1"), code=1)
