"""Several processes on one CPU (gloo) do what one does: FSDP2, HSDP, Muon on sharded matrices,
validation, checkpoints for another number of processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import train
from data.lib import ranks
from data.lib.cli import UserError
from data.lib.plan import micro_plan
from data.lib.safetensors import read_safetensors

SIZES = [
    "--n_layer=2",
    "--n_embd=64",
    "--n_head=4",
    "--n_kv_head=2",
    "--batch_size=8",
    "--max_steps=50",
    "--save_every=10",
]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def launch(digits, out, n: int, *flags) -> subprocess.Popen:
    """train.py on n processes. Its 30 documents of validation cannot be shared evenly."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    start = [sys.executable, *(torchrun if n > 1 else [])]
    data = [
        f"--corpus={digits}/warm",
        f"--thoughts={digits}/warm_thoughts",
        f"--val_corpus={digits}/heldout",
        "--val_every=25",
    ]
    where = [f"--out_dir={out}", "--device=cpu"]
    command = [*start, str(ROOT / "train.py"), *data, *SIZES, *where, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env=ONE_THREAD)


def finish(child: subprocess.Popen, code: int = 0) -> str:
    out, err = child.communicate(timeout=240)
    assert child.returncode == code, out + err
    return out + err


@pytest.fixture(scope="module")
def run_once(digits, tmp_path_factory):
    """The folder of an undisturbed run on one process, which is trained only once."""
    done = {}

    def folder(*flags):
        if flags not in done:
            done[flags] = tmp_path_factory.mktemp("one") / "model"
            finish(launch(digits, done[flags], 1, *flags))
        return done[flags]

    return folder


def curve(out) -> dict[str, dict[int, float]]:
    """{"loss", "grad_norm", "val_loss": {step: value}} of a run; a step that was done twice
    counts with its last value."""
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


# By default Muon on shards here, and AdamW in the test of resuming.
QUICK = "document muon"


@pytest.mark.parametrize(
    "way", [way if way == QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def test_two_processes_equal_one_that_accumulates(digits, run_once, tmp_path, way):
    flags = ["--micro_batch=2", *WAYS[way]]
    one = run_once(*flags)
    two = tmp_path / "two"
    text = finish(launch(digits, two, 2, *flags))
    assert "2 x 2 on each of 2 x cpu" in text
    assert text.count("tokens of text") == 1  # one rank speaks
    assert_equal_curves(one, two, 1e-3 if "muon" in way else 1e-4)
    a = read_safetensors(one / "model.safetensors")
    b = read_safetensors(two / "model.safetensors")
    assert a.keys() == b.keys()
    assert all((a[name] - b[name]).abs().max() < 0.05 for name in a)


@pytest.mark.slow
def test_hsdp_two_by_two_equals_one_process(digits, run_once, tmp_path):
    flags = ["--micro_batch=1", *ADAMW, *PACKED]
    finish(launch(digits, tmp_path / "four", 4, "--replicas=2", *flags))
    assert_equal_curves(run_once(*flags), tmp_path / "four")


@pytest.mark.parametrize(
    "before,after", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)]
)
def test_resume_on_another_number_of_processes(digits, run_once, tmp_path, before, after):
    flags = ["--micro_batch=2", *ADAMW, *PACKED]
    out = tmp_path / "cut"
    child = launch(digits, out, before, *flags)
    folder = out / "checkpoints"
    while not list(folder.glob("*[0-9]")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)  # torchrun hands it to its workers, which save and leave
    _, err = child.communicate(timeout=120)
    assert "saved step" in err and not (out / "config.json").exists()
    step = max(int(path.name) for path in folder.glob("*[0-9]"))
    assert f"from step {step}" in finish(launch(digits, out, after, *flags))
    assert_equal_curves(run_once(*flags), out)


@pytest.mark.slow
def test_bf16_on_two_processes_is_near_bf16_on_one(digits, run_once, tmp_path):
    flags = ["--micro_batch=2", *ADAMW, *PACKED, "--dtype=bfloat16"]
    two = tmp_path / "two"
    finish(launch(digits, two, 2, *flags))
    assert curve(two)["loss"] == pytest.approx(curve(run_once(*flags))["loss"], abs=0.05)
    tensors = read_safetensors(two / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match="--replicas=3 does not divide the 2 devices"):
        micro_plan(train.Settings(replicas=3), 2)
    with pytest.raises(UserError, match="--batch_size=1: fewer rows"):
        micro_plan(train.Settings(batch_size=1), 2)


ALONE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}


@pytest.mark.parametrize("names,said", [
    (["WORLD_SIZE"], "not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start by torchrun, or unset"),
    (["WORLD_SIZE", "RANK"], "not LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start by torchrun"),
    ([*ALONE], "the ranks cannot meet"),
])  # fmt: skip
def test_half_of_torchruns_variables_are_named(names, said, monkeypatch):
    for name in ALONE:
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, ALONE[name])
    with pytest.raises(UserError, match=said):
        ranks.join_ranks("cpu")


def test_a_rank_without_torchrun_is_not_silent(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    ranks.worker_device("cpu")
    print("heard")
    assert "heard" in capsys.readouterr().out


def test_a_single_gpu_needs_no_number(monkeypatch):
    """torch refuses to select "cuda" without a number; it is selected anyway."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(ranks, "pick_device", lambda name: name or "cuda")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert ranks.worker_device("") == "cuda" and not chosen
    assert ranks.worker_device("cuda:1") == "cuda:1" == chosen[0]


@pytest.mark.slow
def test_the_command_refuses_a_batch_that_cannot_be_shared(digits, tmp_path):
    told = finish(launch(digits, tmp_path / "m", 2, "--replicas=3"), code=1)
    assert "--replicas=3 does not divide the 2 devices" in told
    told = finish(launch(digits, tmp_path / "m", 2, "--batch_size=1"), code=1)
    assert "--batch_size=1: fewer rows" in told
