"""The loop as a whole, small: every stage, the report, kills, and that nobody looks at the true thoughts."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SHARED, script

import em
from data.cli import UserError

TINY = ["--iterations=2", "--samples=2", "--max_new=24", "--train=--max_steps=40 --batch_size=16 --save_every=10", "--infer=--part_size=20"]
TIMES = {"seconds", "tokens_per_s"}

# Loaded by every Python process of the run: notes each file that is opened, with the script that does it.
AUDIT = """
import os, sys
def note(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        fd = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{os.path.basename(sys.argv[0]) if hasattr(sys, 'argv') and sys.argv else '?'} {os.fsdecode(args[0])}\\n".encode())
        os.close(fd)
if "AUDIT_LOG" in os.environ:
    busy = []
    def hook(event, args):
        if not busy:
            busy.append(1)
            try: note(event, args)
            finally: busy.pop()
    sys.addaudithook(hook)
"""


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def results(folder) -> dict:
    return without_times(json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """An undisturbed tiny run, watched by the audit hook."""
    folder = tmp_path_factory.mktemp("em")
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(AUDIT)
    env = {"PYTHONPATH": str(folder / "site"), "AUDIT_LOG": str(folder / "opened.txt")}
    done = script("em.py", f"--corpus={digits}", f"--out_dir={folder}/run", *TINY, env=env)
    return folder, done.stdout


def test_report(run):
    folder, out = run
    report = json.loads((folder / "run/results.json").read_text())
    rows = {r["name"]: r for r in report["rows"]}
    assert list(rows) == ["raw_tokens", "raw_flops", "M0", "M1", "M2"] and report["config"]["samples"] == 2
    keys = {"name", "accuracy", "accuracy_se", "n", "ess", "pick_right", "cut_off", "tokens_per_s", "seconds", "train_tokens"}
    for name, row in rows.items():
        assert keys <= set(row) and (set(row["nll_bound"]) == {"1", "4", "16"} if name[0] == "M" else row["nll"] > 0)
    assert rows["raw_flops"]["train_tokens"] == pytest.approx(rows["M1"]["train_tokens"], rel=0.05)
    assert rows["raw_tokens"]["train_tokens"] < rows["M1"]["train_tokens"]
    assert 0 <= rows["M1"]["e_step"]["pick_right"] <= 1 and 1 <= rows["M1"]["e_step"]["ess"] <= 2
    assert out.count("$ python") == 12 and "IWAE-16" in out
    assert (folder / "run/curves.png").read_bytes()[:4] == b"\x89PNG"


def test_neither_step_opens_the_true_thoughts(run):
    """The only opener of raw_truth is em.py's own report; training and the E-step see the raw text and their own thoughts."""
    opened = [line.split(" ", 1) for line in (run[0] / "opened.txt").read_text().splitlines()]
    assert {"train.py", "infer_thoughts.py", "eval_math.py", "em.py"} <= {name for name, _ in opened}
    assert any("/E1/" in path for name, path in opened if name == "train.py"), "the audit sees what train.py reads"
    assert any("/raw/tokens.bin" in path for name, path in opened if name == "infer_thoughts.py")
    assert any("raw_truth" in path for name, path in opened if name == "em.py"), "and would see the true thoughts"
    for name, path in opened:
        assert "raw_truth" not in path or name == "em.py", (name, path)
        assert "heldout_truth" not in path or name == "eval_math.py", (name, path)


def test_rerun_skips_everything_and_changes_nothing(run, digits):
    folder, _ = run
    before = results(folder / "run")
    done = script("em.py", f"--corpus={digits}", f"--out_dir={folder}/run", *TINY)
    assert "$ python" not in done.stdout and done.stdout.count("complete") == 12 and results(folder / "run") == before
    other = script("em.py", f"--corpus={digits}", f"--out_dir={folder}/run", *TINY, "--samples=3", code=1)
    assert "--samples=2 became 3" in other.stderr


def test_the_default_corpus_is_made_once(tmp_path, capsys):
    flags = {"out_dir": tmp_path / "data", "seed": 0}
    for _ in range(2):
        em.stage("data", "data/digits.py", tmp_path / "data", "heldout_truth/meta.json", flags, "", ())
    out = capsys.readouterr().out
    assert out.count("$ python") == 1 and out.count("data: complete") == 1
    with pytest.raises(UserError, match="--seed=0 became 1"):
        em.stage("data", "data/digits.py", tmp_path / "data", "heldout_truth/meta.json", flags | {"seed": 1}, "", ())


def killed_run(flags: list[str], waits: list[float]) -> int:
    """Start em.py once for each wait and kill -9 it alone after that many seconds, its stage left to find out; then let it finish."""
    kills = 0
    for wait in waits:
        child = subprocess.Popen([sys.executable, str(ROOT / "em.py"), *flags], stdout=subprocess.DEVNULL)
        try:
            child.wait(timeout=wait)
            break
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            kills += 1
    subprocess.run([sys.executable, str(ROOT / "em.py"), *flags], check=True, stdout=subprocess.DEVNULL)
    return kills


def test_killed_anywhere_it_ends_in_the_same_results(run, digits, tmp_path):
    """The same command goes on, and never two at once."""
    rng = random.Random(0)
    kills = killed_run([f"--corpus={digits}", f"--out_dir={tmp_path}/run", *TINY], [rng.uniform(1, 9) for _ in range(5)])
    assert kills >= 3 and results(tmp_path / "run")["rows"] == results(run[0] / "run")["rows"]


@pytest.mark.slow
def test_default_run_killed_ten_times(tmp_path):
    """The default run, undisturbed and with ten kills at random moments: about 9 minutes on two cores."""
    begin = time.time()
    script("em.py", f"--out_dir={tmp_path}/calm", timeout=3600)
    rng, seconds = random.Random(0), time.time() - begin
    moments = sorted(rng.uniform(0, seconds) for _ in range(10))
    kills = killed_run([f"--out_dir={tmp_path}/killed"], [b - a for a, b in zip([0.0, *moments], moments)])
    assert kills == 10 and results(tmp_path / "killed") == results(tmp_path / "calm")


def test_ctrl_c_is_one_line_and_leaves_no_stage_behind(digits, tmp_path):
    command = [sys.executable, str(ROOT / "em.py"), f"--corpus={digits}", f"--out_dir={tmp_path}/run", *TINY]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(5)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode != 0 and "interrupted; the same command goes on" in err and "Traceback" not in err and err.strip().count("\n") == 0
    left = subprocess.run(["pgrep", "-f", f"out_dir={tmp_path}"], capture_output=True, text=True).stdout
    assert left == ""


def test_without_matplotlib_everything_else_runs(run, digits, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    env = {"PYTHONPATH": str(tmp_path)}
    done = script("em.py", f"--corpus={digits}", f"--out_dir={run[0]}/run", *TINY, env=env)
    assert "matplotlib is not installed" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent: no real GSM8K to run on")
def test_gsm8k_end_to_end(tmp_path):
    files = [f"--{part}={SHARED}/data/gsm8k/{part}.jsonl" for part in ("train", "test")]
    script("data/gsm8k.py", *files, f"--out_dir={tmp_path}/g", "--raw=300", "--heldout=100")
    flags = ["--train=--max_steps=30 --batch_size=8", "--eval=--bound_docs=30", "--max_new=96", "--iterations=1"]
    script("em.py", f"--corpus={tmp_path}/g", f"--out_dir={tmp_path}/run", *flags, env=dict(os.environ))
    assert [r["name"] for r in results(tmp_path / "run")["rows"]] == ["raw_tokens", "raw_flops", "M0", "M1"]
