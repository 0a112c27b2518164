"""The loop as a whole, small: every stage, the report, kills, and that nobody looks at the true thoughts."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED, script

import em
from data.lib import stages
from data.lib.cli import UserError
from data.lib.corpus import open_corpus, open_thoughts, write_corpus, write_thoughts
from data.lib.results import comparisons, likelihood_gaps, sign_flip, summarise

SMALL = [
    "--max_new=24",
    "--train=--max_steps=40 --save_every=10",
    "--warm_train=--weight_decay=0.3",
    "--infer=--part_size=20",
]
TINY = ["--iterations=2", "--samples=2", *SMALL]
TIMES = {"seconds", "tokens_per_s", "folder"}

# Loaded by every Python process of the run: notes each file that is opened, with the script that does it.
AUDIT = """
import os, sys
def note(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        fd = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        name = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else "?"
        os.write(fd, f"{name} {os.fsdecode(args[0])}\\n".encode())
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


def test_gold_without_true_thoughts_is_refused_before_any_stage(tmp_path):
    for part in ("warm", "warm_thoughts", "raw", "heldout"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "meta.json").write_text("{}")
    how = {"corpus": str(tmp_path), "only": "uniform,gold"}
    with pytest.raises(UserError, match="raw_truth is missing"):
        em.find_data(em.Settings(**how, controls=True), 0, tmp_path, None)
    assert em.find_data(em.Settings(**how), 0, tmp_path, None) == tmp_path


def test_a_seed_is_not_mixed_of_two_runs(tmp_path):
    """A flag that is taken away is noticed, too. The default folder can be the corpus's own."""
    for part in ("warm", "warm_thoughts", "raw", "heldout"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "meta.json").write_text("{}")
    (tmp_path / "settings.json").write_text('{"warm": 250}')  # of data/gsm8k.py

    def seed(**flags):
        em.Seed(em.Settings(corpus=str(tmp_path), **flags), 0, tmp_path, None, None)

    seed(infer="--select=argmax")
    seed(infer="--select=argmax", iterations=1, controls=True, jobs=2)
    with pytest.raises(UserError, match="--infer=--select=argmax became "):
        seed()


def test_rows_without_raw_models_odd_lines_and_no_samples(tmp_path):
    rows = []
    for name in ("M0", "M1"):
        (tmp_path / name / "eval").mkdir(parents=True)
        x = np.arange(3.0)
        nats = {"doc": x, "bytes": x, "tokens": x, "bound_16": x, "thoughtless": x + 1}
        np.savez(tmp_path / name / "eval/likelihood.npz", **nats)
        answer = {"correct": name == "M1", "thought": "a\u2028b\x85"}
        line = json.dumps({"responses": [answer]}, ensure_ascii=False)
        (tmp_path / name / "eval/responses.jsonl").write_text((line + "\n") * 3, encoding="utf-8")
        rows.append({"name": name, "seed": 0, "folder": str(tmp_path / name), "accuracy": 0.0})
    found = {t["figure"]: t for t in comparisons(rows, "M1", em.ARMS)}
    assert found.keys() == {"accuracy", "bound_16"} and found["accuracy"]["difference"] == 1
    [gap] = likelihood_gaps(rows, "M1")
    assert (gap["b"], gap["difference"]) == ("M1 thoughtless", -1)


@pytest.mark.parametrize("flags,said", [("--lr='1", "No closing quotation"), ("n_layer 6", "not n_layer")])
def test_flags_of_stages_are_refused_before_anything_starts(flags, said):
    with pytest.raises(UserError, match=said):
        stages.read_words(flags)
    assert stages.read_words("--lr=1e-3 --compile") == {"lr": "1e-3", "compile": "true"}



def test_report(run):
    folder, out = run
    report = json.loads((folder / "run/results.json").read_text())
    rows = {r["name"]: r for r in report["rows"]}
    assert list(rows) == ["raw_tokens", "raw_flops", "M0", "M1", "M2"] and report["config"]["samples"] == 2
    keys = {
        "name",
        "accuracy",
        "accuracy_sampled",
        "n",
        "ess",
        "pick_right",
        "cut_off",
        "tokens_per_s",
        "seconds",
        "train_tokens",
        "flops",
    }
    for name, row in rows.items():
        assert keys <= set(row) and row["seed"] == 0
        assert (
            set(row["nll_bound"]) == {"1", "4", "16"} and row["nll_thoughtless"] > 0
            if name[0] == "M"
            else row["nll"] > 0
        )
    assert 0 <= rows["M1"]["e_step"]["kept"] <= 1 <= rows["M1"]["e_step"]["ess"] <= 2
    assert [r["name"] for r in report["summary"]] == list(rows)
    assert report["summary"][2]["accuracy"] == [rows["M0"]["accuracy"], None]
    assert out.count("$ python") == 12 and "IWAE-16" in out
    assert (folder / "run/curves.png").read_bytes()[:4] == b"\x89PNG"


def test_flops_count_all_that_a_row_took(run):
    """Training of M0 to Mt at 6 a parameter and token, their E-steps at 2.

    raw_flops is trained for what the last row took.
    """
    folder, rows = (
        run[0] / "run/seed0",
        {r["name"]: r for r in json.loads((run[0] / "run/results.json").read_text())["rows"]},
    )
    training = {name: json.loads((folder / name / "training.json").read_text()) for name in rows}
    meta = [json.loads((folder / f"E{t}/meta.json").read_text()) for t in (1, 2)]
    trained = sum(training[name]["train_tokens"] for name in ("M0", "M1", "M2"))
    assert meta[0]["computed_tokens"] > 2 * meta[0]["sampled_tokens"], "prompts are read, and all is scored"
    n = training["M2"]["n_params"]
    assert rows["M2"]["flops"] == pytest.approx(
        n * (6 * trained + 2 * sum(m["computed_tokens"] for m in meta))
    )
    assert rows["raw_flops"]["flops"] == pytest.approx(rows["M2"]["flops"], rel=0.05)
    assert rows["raw_tokens"]["train_tokens"] < rows["M1"]["train_tokens"]


def test_each_round_has_noise_of_its_own(run):
    """With one seed for all, round t samples with the numbers of round t - 1.

    Then what was unlucky stays so.
    """
    seeds = [
        json.loads((run[0] / f"run/seed0/{name}/settings.json").read_text())["seed"]
        for name in ("E1", "E2", "M1", "M2")
    ]
    assert seeds == [1000, 2000, 0, 0]


def test_m_steps_start_alike(run):
    """Each from M0, or from the base model: what gets better from round to round are the thoughts alone."""
    made_by = {
        name: json.loads((run[0] / f"run/seed0/{name}/settings.json").read_text())
        for name in ("M0", "M1", "M2", "raw_flops")
    }
    assert [Path(made_by[name]["init_from"]).name for name in made_by] == ["", "M0", "M0", ""]
    assert {k for k in made_by["M1"] if made_by["M1"][k] != made_by["M2"][k]} == {"thoughts"}


def test_likelihoods_are_paired_document_by_document(run):
    report = json.loads((run[0] / "run/results.json").read_text())
    last, raw = (np.load(run[0] / f"run/seed0/{name}/eval/likelihood.npz") for name in ("M2", "raw_flops"))
    gaps = {g["b"]: g for g in report["likelihood"]}
    for b, other in (("M2 thoughtless", last["thoughtless"]), ("raw_flops nll", raw["nll"])):
        d = last["bound_16"] - other
        assert (
            (last["doc"] == raw["doc"]).all()
            and gaps[b]["n"] == len(d) == 30
            and gaps[b]["of"] == "documents"
        )
        assert gaps[b]["difference"] == pytest.approx(d.mean()) and gaps[b]["se"] == pytest.approx(
            d.std(ddof=1) / 30**0.5
        )


def test_one_seed_is_paired_problem_by_problem(run):
    report = json.loads((run[0] / "run/results.json").read_text())
    tests = {(t["a"], t["b"], t["figure"]): t for t in report["tests"]}
    evals = [run[0] / f"run/seed0/{name}/eval" for name in ("M2", "M0")]
    answers = [[json.loads(line)["responses"] for line in open(e / "responses.jsonl")] for e in evals]
    right = [np.array([[x["correct"] for x in row] for row in rows], dtype=float) for rows in answers]
    nats = [np.load(e / "likelihood.npz")["bound_16"] for e in evals]
    wanted = {
        "accuracy": (right[0][:, 0] - right[1][:, 0], "problems"),
        "accuracy_sampled": (right[0][:, 1:].mean(1) - right[1][:, 1:].mean(1), "problems"),
        "bound_16": (nats[0] - nats[1], "documents"),
    }
    for figure, (d, of) in wanted.items():
        test = tests["M2", "M0", figure]
        assert (test["n"], test["of"]) == (len(d), of) and len(d) >= 30
        assert test["difference"] == pytest.approx(d.mean(), abs=1e-9)
        assert test["se"] == pytest.approx(d.std(ddof=1) / len(d) ** 0.5)
    assert "M2 - M0" in run[1] and "30 documents" in run[1]


def test_only_names_the_rows_beside_the_loop():
    rows = (*em.RAW_ROWS, *em.CONTROLS)

    def asked(**how):
        return {row for row in rows if em.wanted(em.Settings(**how), row)}

    assert asked() == {"raw_tokens", "raw_flops"}
    assert asked(controls=True) == set(rows)
    assert asked(controls=True, only="gold,raw_tokens") == {"gold", "raw_tokens"}
    with pytest.raises(UserError, match="--only=glod: expected raw_tokens, raw_flops, warm_flops"):
        em.check_settings(em.Settings(controls=True, only="glod"))


def test_a_missing_benchmark_is_refused_before_any_stage(tmp_path):
    here = em.Settings(benchmark="gsm8k", benchmark_eval=f"--file={ROOT}/README.md")
    em.check_settings(here)
    for name in ("gsm9k", "none.jsonl"):
        with pytest.raises(UserError, match=f"{name}.*no such file"):
            em.check_settings(em.Settings(benchmark=name))


def test_neither_step_opens_the_true_thoughts(run):
    """The only opener of raw_truth is em.py's own report.

    Training and the E-step see the raw text and their own thoughts.
    """""
    opened = [line.split(" ", 1) for line in (run[0] / "opened.txt").read_text().splitlines()]
    assert {"train.py", "infer_thoughts.py", "eval_math.py", "em.py"} <= {name for name, _ in opened}
    assert any("/E1/" in path for name, path in opened if name == "train.py"), (
        "the audit sees what train.py reads"
    )
    assert any("/raw/tokens.bin" in path for name, path in opened if name == "infer_thoughts.py")
    assert any("raw_truth" in path for name, path in opened if name == "em.py"), (
        "and would see the true thoughts"
    )
    for name, path in opened:
        assert "raw_truth" not in path or name == "em.py", (name, path)
        assert "heldout_truth" not in path or name == "eval_math.py", (name, path)


def test_rerun_skips_everything_and_changes_nothing(run, digits):
    folder, _ = run
    before = results(folder / "run")
    done = script("em.py", f"--corpus={digits}", f"--out_dir={folder}/run", *TINY)
    assert (
        "$ python" not in done.stdout
        and done.stdout.count("complete") == 12
        and results(folder / "run") == before
    )
    other = script("em.py", f"--corpus={digits}", f"--out_dir={folder}/run", *TINY, "--samples=3", code=1)
    assert "--samples=2 became 3" in other.stderr


def test_the_default_corpus_is_made_once(tmp_path, capsys):
    flags = {"out_dir": tmp_path / "data", "seed": 0}
    for _ in range(2):
        stages.Stages().run("data", "data/digits.py", tmp_path / "data", "heldout_truth/meta.json", flags)
    out = capsys.readouterr().out
    assert out.count("$ python") == 1 and out.count("data: complete") == 1
    with pytest.raises(UserError, match="--seed=0 became 1"):
        stages.Stages().run(
            "data", "data/digits.py", tmp_path / "data", "heldout_truth/meta.json", flags | {"seed": 1}
        )


def killed_run(flags: list[str], waits: list[float]) -> int:
    """Start em.py once for each wait, and kill -9 it alone after that many seconds.

    Its stages are left to find out. At last it may finish; returns the number of kills.
    """""
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


@pytest.mark.slow
def test_killed_anywhere_it_ends_in_the_same_results(run, digits, tmp_path):
    """The same command goes on, and never two at once."""
    rng = random.Random(0)
    kills = killed_run(
        [f"--corpus={digits}", f"--out_dir={tmp_path}/run", *TINY], [rng.uniform(1, 9) for _ in range(5)]
    )
    assert kills >= 3 and results(tmp_path / "run")["rows"] == results(run[0] / "run")["rows"]


@pytest.mark.long
def test_default_run_killed_ten_times(tmp_path):
    """The default run, undisturbed and with ten kills at random moments: about 9 minutes on two cores."""
    begin = time.time()
    script("em.py", f"--out_dir={tmp_path}/calm", timeout=3600)
    rng, seconds = random.Random(0), time.time() - begin
    moments = sorted(rng.uniform(0, seconds) for _ in range(10))
    kills = killed_run([f"--out_dir={tmp_path}/killed"], [b - a for a, b in zip([0.0, *moments], moments)])
    assert kills == 10 and results(tmp_path / "killed") == results(tmp_path / "calm")


def test_ctrl_c_is_one_line_and_leaves_no_stage_behind(digits, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "em.py"),
        f"--corpus={digits}",
        f"--out_dir={tmp_path}/run",
        "--jobs=2",
        *TINY,
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(5)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert (
        child.returncode != 0
        and "interrupted; the same command goes on" in err
        and "Traceback" not in err
        and err.strip().count("\n") == 0
    )
    left = subprocess.run(["pgrep", "-f", f"out_dir={tmp_path}"], capture_output=True, text=True).stdout
    assert left == ""


def test_without_matplotlib_everything_else_runs(run, digits, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    env = {"PYTHONPATH": str(tmp_path)}
    done = script("em.py", f"--corpus={digits}", f"--out_dir={run[0]}/run", *TINY, env=env)
    assert "matplotlib is not installed" in done.stdout


@pytest.mark.long
@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent: no real GSM8K to run on")
def test_gsm8k_end_to_end(tmp_path):
    files = [f"--{part}={SHARED}/data/gsm8k/{part}.jsonl" for part in ("train", "test")]
    script("data/gsm8k.py", *files, f"--out_dir={tmp_path}/g", "--raw=300", "--heldout=100")
    flags = [
        "--train=--max_steps=30 --batch_size=8",
        "--eval=--bound_docs=30",
        "--max_new=96",
        "--iterations=1",
    ]
    script("em.py", f"--corpus={tmp_path}/g", f"--out_dir={tmp_path}/run", *flags, env=dict(os.environ))
    assert [r["name"] for r in results(tmp_path / "run")["rows"]] == ["raw_tokens", "raw_flops", "M0", "M1"]


@pytest.mark.slow
def test_controls_side_by_side(digits, tmp_path):
    """All controls of one round, two stages at a time, each into its log.

    The same numbers come out as one at a time.
    """
    flags = [f"--corpus={digits}", "--iterations=1", "--samples=2", "--controls", *SMALL]
    flags += ["--eval=--bound_docs=5 --limit=10"]
    out = script("em.py", f"--out_dir={tmp_path}/two", "--jobs=2", *flags, timeout=600).stdout
    report = json.loads((tmp_path / "two/results.json").read_text())
    names = ["raw_tokens", "raw_flops", "warm_flops", "warm_x4", "M0", "M1"]
    names += [*(f"{arm}/M1" for arm in em.ARMS), "gold"]
    assert [r["name"] for r in report["rows"]] == names
    rows = {r["name"]: r for r in report["rows"]}
    for name in ("raw_flops", "warm_flops"):
        assert rows[name]["flops"] == pytest.approx(rows["M1"]["flops"], rel=0.05), name
    assert rows["warm_x4"]["train_tokens"] == pytest.approx(4 * rows["M0"]["train_tokens"], rel=0.05)
    made = {
        arm: json.loads((tmp_path / f"two/seed0/{arm}/E1/meta.json").read_text()) for arm in ("", *em.ARMS)
    }
    assert made["uniform"]["selection"] == "uniform" and made["uniform"]["no_gain"] == 0 < made[""]["no_gain"]
    assert made["weights"]["selection"] == "resample" and made["weights"]["no_gain"] == 0
    assert made["gain"]["selection"] == "uniform" and made["gain"]["no_gain"] > 0
    assert made["prior"]["proposal"] == "prior"
    assert [made[f"samples{k}"]["samples"] for k in (1, 16)] == [1, 16]
    assert len({m["weights"] for m in made.values()}) == 1, "all start from the same M0"
    assert (
        rows["gold"]["train_tokens"] > rows["raw_tokens"]["train_tokens"]
        and rows["M1"]["e_step"]["sampled_tokens"] == made[""]["sampled_tokens"]
    )
    compared = {(t["a"], t["b"]) for t in report["tests"]}
    assert {("M1", "M0"), ("M1", "warm_flops"), ("M1", "uniform/M1"), ("M1", "samples1/M1")} <= compared
    assert (
        "train " not in out
        and (tmp_path / "two/seed0/uniform/M1.log").stat().st_size > 0
        and "uniform/M1: done in" in out
    )
    plain = [f for f in flags if f != "--controls"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    script("em.py", f"--out_dir={tmp_path}/one", "--jobs=1", *plain, env=threads)
    alone = {r["name"]: r for r in results(tmp_path / "one")["rows"]}
    for name, row in alone.items():
        assert row == without_times(rows[name]), name


@pytest.mark.slow
def test_a_stage_that_fails_ends_all(digits, tmp_path):
    flags = [f"--corpus={digits}", f"--out_dir={tmp_path}/run", "--jobs=2", *TINY, "--eval=--bound_docs=-1"]
    done = script("em.py", *flags, code=1)
    assert (
        "--bound_docs=-1: must be at least 0" in done.stderr
        and "ended with exit code" in done.stderr.splitlines()[-1]
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "run/results.json").exists()
    assert not (tmp_path / "run/seed0/E2").exists(), (
        "an evaluation of M0 that fails ends the loop, not only itself"
    )
    left = subprocess.run(["pgrep", "-f", f"out_dir={tmp_path}"], capture_output=True, text=True).stdout
    assert left == ""


def test_settings_are_compared_by_value():
    assert (
        stages.same(-1e9, "-inf")
        and stages.same(0.0, "0")
        and stages.same("uniform", "uniform")
        and stages.same(64, "64")
        and stages.same(True, "true")
        and stages.same(False, "0")
    )
    assert (
        not stages.same(0.0, "-inf")
        and not stages.same(0.5, "x")
        and not stages.same(64, "65")
        and not stages.same("a", "b")
        and not stages.same(True, "false")
    )


def test_slots_let_the_first_in_order_in():
    slots, entered, ready = stages.Slots(1), [], []

    def enter(order):
        ready.append(order)
        with slots.hold(order):
            entered.append(order)

    with slots.hold(0):
        threads = [threading.Thread(target=enter, args=(order,)) for order in (5, 1, 3)]
        for thread in threads:
            thread.start()
        while len(slots.waiting) < 3:
            time.sleep(0.01)
        assert entered == []
    for thread in threads:
        thread.join()
    assert entered == [1, 3, 5] and slots.free == 1


def test_sign_flips_are_exact():
    assert sign_flip([1.0] * 10) == 2 / 1024 and sign_flip([1.0]) == 1.0 and sign_flip([0.0, 0.0]) == 1.0
    d = [0.3, -0.1, 0.2, 0.4]
    sums = [abs(sum(s * x for s, x in zip(signs, d))) for signs in itertools.product((1, -1), repeat=4)]
    assert sign_flip(d) == pytest.approx(np.mean([x >= sum(d) - 1e-9 for x in sums]))
    rng = np.random.default_rng(0)
    assert np.mean([sign_flip(rng.normal(size=10)) < 0.05 for _ in range(400)]) == pytest.approx(
        0.05, abs=0.03
    )
    assert 0 < sign_flip(rng.normal(size=40) + 2) < 0.001


def test_comparisons_pair_the_seeds():
    accuracies = {"M0": (0.1, 0.5, 0.3), "M1": (0.2, 0.7, 0.6), "uniform/M1": (0.3, 0.6)}
    rows = [
        {"name": name, "seed": seed, "accuracy": a, "accuracy_sampled": a / 2}
        | {"nll_bound_document": {"16": 3 - a}}
        for name, each in accuracies.items()
        for seed, a in enumerate(each)
    ]
    tests = {(t["a"], t["b"], t["figure"]): t for t in comparisons(rows, "M1", em.ARMS)}
    first = tests["M1", "M0", "accuracy"]
    assert (
        first["difference"] == pytest.approx(0.2)
        and first["se"] == pytest.approx(0.1 / 3**0.5)
        and (first["above"], first["n"]) == (3, 3)
    )
    assert first["p"] == 0.25 and tests["M1", "uniform/M1", "accuracy"]["n"] == 2, "only seeds that both have"
    assert tests["M1", "M0", "accuracy_sampled"]["difference"] == pytest.approx(0.1)
    assert tests["M1", "M0", "bound_16"]["difference"] == pytest.approx(-0.2)
    assert first["of"] == "seeds"
    summary = {r["name"]: r for r in summarise(rows)}
    assert summary["M0"]["accuracy"] == (pytest.approx(0.3), pytest.approx(0.2))


@pytest.mark.slow
def test_plain_text_through_the_loop(digits, tmp_path):
    """The paper's own case: a corpus without questions.

    There is no accuracy; likelihood by iteration is the result.
    """
    tok = open_corpus(digits / "warm").tokenizer
    for part in ("warm", "raw", "heldout"):
        corpus = open_corpus(digits / part)
        texts = [
            [tok.decode(corpus.chunk(i)) for i in range(a, b)] for a, b in zip(corpus.docs, corpus.docs[1:])
        ]
        write_corpus(
            tmp_path / "text" / part, [[(text, False) for text in document] for document in texts], tok, {}
        )
    warm, thoughts = (
        open_corpus(tmp_path / "text/warm"),
        open_thoughts(digits / "warm_thoughts", open_corpus(digits / "warm")),
    )
    spans = [thoughts.span(i) if i % 2 else thoughts.span(i + 1)[:2] for i in range(warm.n_chunks)]
    write_thoughts(tmp_path / "text/warm_thoughts", warm, spans, {})
    flags = [
        f"--corpus={tmp_path}/text",
        f"--out_dir={tmp_path}/run",
        "--iterations=1",
        *SMALL,
        "--eval=--bound_docs=10",
    ]
    out = script("em.py", *flags).stdout
    rows = {r["name"]: r for r in results(tmp_path / "run")["rows"]}
    assert list(rows) == ["raw_tokens", "raw_flops", "M0", "M1"] and "accuracy" not in rows["M1"]
    assert (
        rows["M1"]["nll_bound_document"]["16"] > 0
        and rows["M1"]["nll_thoughtless_document"] > 0 < rows["raw_flops"]["nll_document"]
    )
    [m1] = [r for r in results(tmp_path / "run")["summary"] if r["name"] == "M1"]
    assert m1["bound_16"][0] == rows["M1"]["nll_bound"]["16"] < rows["M1"]["nll_bound_document"]["16"]
    assert "nats a byte" in out and "M1 IWAE-16 - raw_flops nll" in out
    assert (tmp_path / "run/curves.png").exists()


@pytest.mark.slow
def test_a_benchmark_and_two_devices(digits, tmp_path):
    """Stages start by torchrun on two devices (here: gloo on a CPU), and each model answers a benchmark."""
    problem = {"question": "Start at 3. Add 4.", "answer": "#### 7"}
    (tmp_path / "few.jsonl").write_text((json.dumps(problem) + "\n") * 3)
    flags = [f"--corpus={digits}", f"--out_dir={tmp_path}/run", "--iterations=1", *SMALL]
    flags += ["--device=cpu", "--devices=2", f"--benchmark={tmp_path}/few.jsonl"]
    flags += ["--benchmark_eval=--max_new=40", "--eval=--bound_docs=3 --limit=3"]
    out = script("em.py", *flags, env={"OMP_NUM_THREADS": "1"}).stdout
    assert out.count("$ torchrun --standalone --nproc_per_node=2 train.py") == 4
    assert (
        out.count("$ torchrun --standalone --nproc_per_node=2 infer_thoughts.py") == 1
        and out.count("$ python eval_math.py") == 8
    )
    for row in results(tmp_path / "run")["rows"]:
        answered = json.loads((tmp_path / f"run/seed0/{row['name']}/benchmark/results.json").read_text())
        assert answered["n"] == 3 and answered["too_long"] == 0 and row["benchmark"] == answered["accuracy"]
    assert any("benchmark" in line and "greedy" in line for line in out.splitlines()), "a column of the table"
