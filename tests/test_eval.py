"""Problems, prompts, responses, scores, resuming, comparison, fine-tuning, likelihood."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, TOY, corpus_of, script

import eval_math
import train
from data.cli import UserError
from data.corpus import PRIOR, RAW, layout, open_corpus, write_corpus
from data.tokenizer import load_tokenizer, make_tokenizer
from eval_math import (
    Item,
    Problem,
    Settings,
    benchmark_problems,
    choose_shots,
    corpus_problems,
    few_shot_prompt,
    paired,
    pass_at,
    read_item,
    read_items,
    respond,
    scores,
    sign_test,
    text_nll,
)
from infer_thoughts import Engine


def settings(**values) -> Settings:
    return Settings(out_dir="", **{"max_new": 40} | values)


# -------------------------------------------------------------------------------------------------------- reading problems


def test_rows_of_all_benchmarks_are_read():
    gsm = read_item({"question": " How many? ", "answer": "2 + 3 = <<2+3=5>>5\nSo 5.\n#### 5"}, "f:1")
    assert gsm == Item("How many?", "2 + 3 = 5\nSo 5.", "5", {})
    solution = "We get $\\boxed{\\frac{1}{2}}$."
    math_row = read_item({"problem": "Find $x$.", "solution": solution, "level": "Level 3", "type": "Algebra"}, "f:1")
    assert math_row == Item("Find $x$.", solution, "\\frac{1}{2}", {"level": "3", "subject": "Algebra"})
    mmlu = read_item({"question": "Which?", "choices": ["a", "b", "c"], "answer": 2, "type": "physics"}, "f:1")
    assert mmlu == Item("Which?\n(A) a\n(B) b\n(C) c", "", "C", {"subject": "physics"})
    assert read_item({"question": "How?", "answer": 7}, "f:1").answer == "7"
    for bad in ({"question": "q"}, {"answer": "5"}, {"question": "", "answer": "5"}, {"question": "q", "choices": ["a"], "answer": 3}, {"question": 3, "answer": "5"}):
        with pytest.raises(UserError, match="f:1: field"):
            read_item(bad, "f:1")


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "1"}\n{"question": \n')
    with pytest.raises(UserError, match="bad.jsonl:2: not JSON"):
        read_items(tmp_path / "bad.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="list.jsonl:1: expected a JSON object"):
        read_items(tmp_path / "list.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no problem"):
        read_items(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="get it by `python data/benchmarks.py gsm8k`"):
        eval_math.find_file(settings(benchmark="gsm8k", file=str(tmp_path / "no.jsonl")), "test")
    with pytest.raises(UserError, match="is one of gsm8k"):
        eval_math.find_file(settings(benchmark="gsm9k"), "test")


def test_parquet_is_read_like_jsonl(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"question": "Which?", "choices": ["a", "b"], "answer": 1}, {"question": "And?", "choices": ["c", "d"], "answer": 0}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_items(tmp_path / "t.parquet") == read_items(tmp_path / "t.jsonl")
    (tmp_path / "bad.parquet").write_text("nothing")
    with pytest.raises(UserError, match="not a parquet file"):
        read_items(tmp_path / "bad.parquet")


def test_shots_by_seed_and_never_a_tested_problem(tmp_path):
    rows = [{"question": f"q{i}", "solution": f"s{i}", "answer": str(i)} for i in range(20)] + [{"question": "unsolved", "answer": "1"}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    tested = [Item("q3", "", "3", {})]
    s = settings(benchmark="gsm8k", shots="train", train_file=str(path), n_shots=19)
    chosen = [choose_shots(replace(s, seed=seed), tested) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert sorted(x.question for x in chosen[0]) == sorted(f"q{i}" for i in range(20) if i != 3)
    with pytest.raises(UserError, match="19 examples"):
        choose_shots(replace(s, n_shots=20), tested)
    assert [x.question for x in choose_shots(settings(benchmark="gsm8k", shots=str(path), n_shots=2), [])] == ["q0", "q1"]
    assert choose_shots(settings(benchmark="mine.jsonl"), []) == []
    with pytest.raises(UserError, match="no examples of ours"):
        choose_shots(settings(benchmark="mine.jsonl", n_shots=2), [])


@pytest.mark.parametrize("name,n", [("gsm8k", 8), ("math", 4), ("math500", 4), ("mmlu_stem", 4)])
def test_our_own_examples_grade_true_against_their_answers(name, n):
    shots = choose_shots(settings(benchmark=name), [])
    assert len(shots) == n
    for x in shots:
        written = x.solution + x.answer_text
        assert eval_math.judge(written, x.answer) == {"extracted": eval_math.extract_answer(written), "correct": True, "strict": True, "graded": True}


@pytest.mark.parametrize("name,file", [("gsm8k", "gsm8k/test.jsonl"), ("math", "math/sample50.jsonl"), ("mmlu_stem", "mmlu_stem/sample300.jsonl")])
def test_prompts_leave_room_in_2048_tokens(name, file):
    """All examples and the longest question of the real benchmarks, in Llama 2's tokens, with 512 new ones and an answer."""
    if not SHARED.exists():
        pytest.skip("needs ../shared/data")
    tok = load_tokenizer(SHARED / "data/llama2/tokenizer.json")
    for mode in ("raw", "latent"):
        s = settings(benchmark=name, file=str(SHARED / "data" / file), mode=mode, max_new=512)
        problems, counts = benchmark_problems(s, tok, 2048)
        assert counts["dropped_shots"] == counts["too_long"] == 0 and counts["n_shots"] == {"gsm8k": 8}.get(name, 4)
        assert max(len(p.prompt) for p in problems) <= 2048 - 512 - 32


# ------------------------------------------------------------------------------------------------------------ prompts

SHOTS = [Item("What is 2 + 3?", "2 + 3 = 5.", "5", {}), Item("What is $4 + 4$?", "It is $8$.", "8", {})]
ASKED = Item("What is 1 + 1?", "", "2", {})


@pytest.fixture(scope="module")
def tok():
    return make_tokenizer([SHOTS[0].question_text + SHOTS[0].solution + SHOTS[0].answer_text] * 3, 300)


def test_raw_prompt_is_one_string(tok):
    text = (
        "Problem:\nWhat is 2 + 3?\n\nSolution:\n2 + 3 = 5.\nThe final answer is 5.\n\n"
        "Problem:\nWhat is $4 + 4$?\n\nSolution:\nIt is $8$.\nThe final answer is $8$.\n\n"
        "Problem:\nWhat is 1 + 1?\n\nSolution:\n"
    )
    assert few_shot_prompt(tok, SHOTS, ASKED, "raw").tolist() == [tok.bos, *tok.encode(text)]


def test_latent_prompt_has_the_markers_of_training(tok):
    """Token by token what data.corpus.layout writes for such a document in training, up to the thought that is asked for."""
    chunks, thoughts = [], []
    for x in [*SHOTS, ASKED]:
        chunks += [tok.encode(x.question_text), tok.encode(x.answer_text + "\n\n")]
        thoughts += [[], tok.encode(x.solution)]
    whole, parts = layout(tok, chunks, thoughts, [RAW, PRIOR] * 3)
    prompt = few_shot_prompt(tok, SHOTS, ASKED, "latent").tolist()
    assert prompt == whole[: parts[-1].thought[0]].tolist()
    assert [t for t in prompt if t in (tok.bos, tok.eos, tok.sol, tok.eol, tok.pri, tok.pos)] == [tok.bos, *[tok.sol, tok.pri, tok.eol] * 2, tok.sol, tok.pri]
    assert prompt[-2:] == [tok.sol, tok.pri]


def test_prompts_that_do_not_fit_are_refused_or_lose_examples(tok, tmp_path):
    path, shots = tmp_path / "test.jsonl", tmp_path / "shots.jsonl"
    path.write_text(json.dumps({"question": ASKED.question, "answer": "2"}) + "\n" + json.dumps({"question": "very long " * 60, "answer": "2"}) + "\n")
    shots.write_text("".join(json.dumps({"question": x.question, "solution": x.solution, "answer": x.answer}) + "\n" for x in SHOTS))
    s = settings(benchmark=str(path), shots=str(shots), n_shots=2, mode="raw", max_new=8)
    both, one, none = (len(few_shot_prompt(tok, SHOTS[n:], ASKED, "raw")) for n in range(3))
    long = len(few_shot_prompt(tok, [], read_items(path)[1], "raw"))
    assert none < one < both < long
    with pytest.raises(UserError, match="problem 0: 2 examples and the question are .* tokens"):
        benchmark_problems(s, tok, both + 7)
    problems, counts = benchmark_problems(replace(s, drop_shots=True), tok, both + 7)
    assert problems[0].about["n_shots"] == 1 and len(problems[0].prompt) == one
    assert counts["dropped_shots"] == 1 + 2 and counts["too_long"] == 1 and len(problems[1].prompt) == 0
    assert benchmark_problems(replace(s, limit=1), tok, both + 8)[1]["dropped_shots"] == 0


def test_problems_of_a_corpus_follow_their_question(tok):
    corpus = corpus_of([[[0], [1], [0], [1]], [[0]], [[1], [1]]], questions=[True, False, True, False, True, False, False])
    problems, _ = corpus_problems(settings(corpus="c"), tok, corpus, 128)
    assert [p.key for p in problems] == [1, 3]  # a question that ends its document is followed by nothing
    assert problems[1].prompt.tolist() == [tok.bos, 0, 1, 0, tok.sol, tok.pri]
    assert corpus_problems(settings(corpus="c", mode="raw", before=1), tok, corpus, 128)[0][1].prompt.tolist() == [tok.bos, 0]
    with pytest.raises(UserError, match="no questions to answer"):
        corpus_problems(settings(corpus="c"), tok, corpus_of([[[0], [1]]]), 128)


# ---------------------------------------------------------------------------------------------------------- responses


class Scripted:
    """An engine that says what it is told to: {prompt as a tuple: text or ids}."""

    def __init__(self, said: dict):
        self.said, self.calls = said, []

    def generate(self, prompts, keys, samples, max_new, stop, seed, **how):
        self.calls.append((prompts, list(keys), max_new, how))
        out = []
        for p in prompts:
            ids = self.said[tuple(int(t) for t in p)]
            end = next((i + 1 for i, t in enumerate(ids) if t in stop), None)
            out.append([(np.array(ids[: end or max_new][:max_new]), end is not None and end <= max_new, 0.0)] * samples)
        return out


def test_latent_responses_and_budget_forcing(tok):
    """A thought that ends; one that does not, cut off or closed at the budget; a problem that did not fit the model."""
    thought, answer = tok.encode("2 + 3 = 5."), tok.encode("The final answer is 5.")
    good, endless, n = [tok.bos, 1], [tok.bos, 2], len(tok.encode("2 + 3 = 5."))
    said = {tuple(good): [*thought, tok.eol, *answer, tok.eos], tuple(endless): thought * 50}
    for budget in (n + 1, n - 1):
        said |= {(*p, *ids[:budget], tok.eol): [*answer, tok.eos] for p, ids in ((good, thought), (endless, thought * 50))}
    problems = [Problem(0, np.array(good), "5"), Problem(1, np.array(endless), "5"), Problem(2, np.array([], int), "5")]
    s = settings(benchmark="x", max_new=n + 1)
    [a], [b], [c] = respond(Scripted(said), tok, problems, s, 1, 0.0, 1.0)
    assert (a["thought"], a["response"], a["cut_off"], a["tokens"]) == (tok.decode(thought), tok.decode(answer), False, n + 1 + len(answer))
    assert b["cut_off"] and b["response"] == "" and not b["forced"]
    assert c == {"response": "", "tokens": 0, "cut_off": True, "forced": False}
    [a], [b], _ = respond(Scripted(said), tok, problems, replace(s, max_thought=n + 1), 1, 0.0, 1.0)
    assert not a["forced"] and b["forced"] and not b["cut_off"]
    assert (b["thought"], b["response"], b["tokens"]) == (tok.decode((thought * 50)[: n + 1]), tok.decode(answer), n + 2 + len(answer))
    [a], [b], _ = respond(Scripted(said), tok, problems, replace(s, max_thought=n - 1), 1, 0.0, 1.0)
    assert a["forced"] and b["forced"] and a["thought"] == tok.decode(thought[: n - 1])  # one that would have ended later is closed, too


def test_raw_responses_stop_where_told(tok):
    text = tok.encode("It is 5.\nThe final answer is 5.\n")
    engine = Scripted({(tok.bos, 1): [*text, tok.eos]})
    [[r]] = respond(engine, tok, [Problem(0, np.array([tok.bos, 1]), "5")], settings(benchmark="x", mode="raw", max_new=99), 1, 0.0, 1.0)
    assert r == {"response": tok.decode(text), "tokens": len(text), "cut_off": False, "forced": False}
    ends = engine.calls[0][3]["ends"]
    assert ends(np.array(text)) and ends(np.array(tok.encode("so.\n\nProblem: next"))) and not ends(np.array(tok.encode("The final answer is 5")))


# -------------------------------------------------------------------------------------------------------------- scores


def response(right, extracted="1", **more):
    return {"correct": right, "strict": right, "extracted": extracted, "cut_off": False, "forced": False, "graded": True} | more


def test_scores_of_a_known_table():
    records = [
        {"level": "1", "responses": [response(True), response(True, "5"), response(False, "6"), response(False, "6"), response(True, "5")], "alike": [0, 1, 1, 0]},
        {"level": "2", "responses": [response(False, None, cut_off=True), *[response(False, x) for x in "7788"]], "alike": [0, 0, 2, 2]},
    ]
    got = scores(records, 4)
    assert got["accuracy"] == got["exact_match,flexible-extract"] == 0.5 and got["accuracy_se"] == pytest.approx(0.5)  # sd .707 / sqrt 2
    assert (got["n"], got["cut_off"], got["no_answer"], got["not_graded"]) == (2, 1, 1, 0)
    sampled = got["sampled"]
    assert sampled["accuracy"] == 0.25 and sampled["pass@1"] == 0.25 and sampled["pass@4"] == 0.5
    assert sampled["pass@2"] == pytest.approx((1 - 1 / 6) / 2)  # two wrong of two wrong ones among four: 1 of 6 pairs
    assert sampled["maj@4"] == 0.5 and sampled["maj@2"] == 0.5  # 5, 6, 6, 5: the one that came first
    assert got["by_level"] == {"1": {"n": 1, "accuracy": 1.0}, "2": {"n": 1, "accuracy": 0.0}}


def test_pass_at_is_unbiased():
    """The mean of pass_at over all ways to draw n responses equals the chance that one of k is right."""
    p, n = 0.3, 6
    for k in (1, 2, 5):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


def test_significance():
    assert sign_test(0, 0) == 1.0 and sign_test(5, 5) == 1.0 and sign_test(0, 6) == pytest.approx(2 / 64) and sign_test(6, 0) == sign_test(0, 6)
    a, b = {str(i): i < 5 for i in range(10)}, {str(i): i < 8 for i in range(10)}
    got = paired(a, b)
    assert got["difference"] == pytest.approx(0.3) and (got["only_first"], got["only_second"]) == (0, 3) and got["p"] == 0.25
    assert got["difference_se"] == pytest.approx(np.std([0] * 7 + [1] * 3, ddof=1) / math.sqrt(10))


# ---------------------------------------------------------------------------------------------------------- likelihood


def test_text_nll_equals_the_whole_document(toy_model):
    """By the chain rule, the chunks' conditional NLLs add up to that of the document."""
    corpus = corpus_of([[[0, 1], [1], [0, 0, 1]]])
    got = text_nll(Engine(toy_model), TOY, corpus, np.arange(3), settings(corpus="c"))
    ids = torch.tensor([[TOY.bos, 0, 1, 1, 0, 0, 1]])
    log_p = torch.log_softmax(toy_model.logits(toy_model(ids))[0], -1)
    assert got.sum() == pytest.approx(-log_p[range(6), ids[0, 1:]].sum().item(), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def models(digits, tmp_path_factory):
    """A latent and a raw model that know the 40 warm documents by heart."""
    out = tmp_path_factory.mktemp("models")
    quick = ["--max_steps=250", "--batch_size=16"]
    script("train.py", f"--corpus={digits}/warm", f"--thoughts={digits}/warm_thoughts", f"--out_dir={out}/latent", *quick)
    script("train.py", f"--corpus={digits}/warm", f"--out_dir={out}/raw", *quick)
    return out


@pytest.fixture(scope="module")
def sums(digits, tmp_path_factory):
    """A benchmark in the words of the digits corpus: (test file, file of worked examples)."""
    folder = tmp_path_factory.mktemp("bench")
    corpus = open_corpus(digits / "warm")
    from data.corpus import open_thoughts

    thoughts, tok = open_thoughts(digits / "warm_thoughts", corpus), corpus.tokenizer
    rows = []
    for d in range(corpus.n_docs):
        first = int(corpus.docs[d])
        question, solution = tok.decode(corpus.chunk(first)), tok.decode(thoughts.span(first + 1))
        rows.append({"question": question, "solution": solution, "answer": tok.decode(corpus.chunk(first + 1)).strip(" .").split()[-1], "level": str(d % 2)})
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:12]))
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[12:]))
    return folder


def test_learned_documents_are_answered(digits, models, tmp_path):
    """End to end: what was trained on is thought, answered and graded right."""
    flags = [f"--corpus={digits}/warm", "--max_new=40", "--k=2", "--temperature=1", "--top_p=1"]
    script("eval_math.py", *flags, f"--model={models}/latent", f"--out_dir={tmp_path}/l", f"--thoughts={digits}/warm_thoughts")
    script("eval_math.py", *flags, f"--model={models}/raw", f"--out_dir={tmp_path}/r", "--mode=raw")
    latent, raw = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("l", "r"))
    assert latent["accuracy"] > 0.9 and raw["accuracy"] > 0.9 and latent["n"] == raw["n"] == 40
    assert latent["sampled"]["accuracy"] > 0.5 and latent["sampled"]["pass@2"] >= latent["sampled"]["pass@1"]
    assert latent["pick_right"] > 0.8 and latent["nll_bound"].keys() == {"1", "4", "16"} and "nll" in raw
    bounds = [latent["nll_bound"][k] for k in ("1", "4", "16")]
    assert bounds[0] > bounds[1] > bounds[2] > 0
    for a_byte, a_token, a_document in ((latent["nll_bound"]["4"], latent["nll_bound_token"]["4"], latent["nll_bound_document"]["4"]),
                                        (raw["nll"], raw["nll_token"], raw["nll_document"])):  # fmt: skip
        assert a_byte * raw["bytes"] == pytest.approx(a_token * raw["tokens"]) == pytest.approx(a_document * raw["bound_docs"])
    lines = [json.loads(line) for line in (tmp_path / "l/responses.jsonl").read_text().splitlines()]
    assert len(lines) == 40 and sum(r["responses"][0]["correct"] for r in lines) == latent["accuracy"] * 40
    assert all("=" in r["responses"][0]["thought"] and "digit" in r["responses"][0]["response"] for r in lines if r["responses"][0]["correct"])
    assert "complete" in script("eval_math.py", *flags, f"--model={models}/raw", f"--out_dir={tmp_path}/r", "--mode=raw").stdout


def test_a_benchmark_in_both_modes_and_their_comparison(sums, models, tmp_path):
    """--benchmark=FILE with --shots, show, several models, then --compare over modes: the same code path as the corpora above."""
    flags = [f"--benchmark={sums}/test.jsonl", f"--shots={sums}/train.jsonl", "--n_shots=2", "--max_new=48", "--k=3"]
    done = script("eval_math.py", *flags, f"--model={models}/latent", f"--out_dir={tmp_path}/l", "--show=1", "--max_thought=40")
    assert "12 problems, 2 examples, prompts of" in done.stdout and "tokens, 2 examples; gold:" in done.stdout and done.stdout.count("<|PRIOR_PREFIX|>") == 3
    script("eval_math.py", *flags, f"--model={models}/raw,{models}/latent", "--mode=raw", f"--out_dir={tmp_path}/r")
    results = json.loads((tmp_path / "l/results.json").read_text())
    assert results["n"] == 12 and results["n_shots"] == 2 and set(results["by_level"]) == {"0", "1"} and results["until"] and len(results["prompt_hash"]) == 16
    assert {"exact_match,flexible-extract", "exact_match_stderr,flexible-extract", "exact_match,strict-match", "exact_match_stderr,strict-match"} <= set(results)
    assert (tmp_path / "r/compare.json").exists() and (tmp_path / "r/raw/results.json").exists()
    done = script("eval_math.py", f"--compare={tmp_path}/l,{tmp_path}/r/raw", f"--out_dir={tmp_path}/c")
    compared = json.loads((tmp_path / "c/compare.json").read_text())
    assert len(compared["runs"]) == 2 and 0 < compared["pairs"][0]["p"] <= 1 and "| latent | 12 | 2 |" in done.stdout and "p = " in done.stdout
    script("eval_math.py", *flags, "--limit=5", f"--model={models}/raw", "--mode=raw", f"--out_dir={tmp_path}/few")
    assert "asked other problems" in script("eval_math.py", f"--compare={tmp_path}/l,{tmp_path}/few", f"--out_dir={tmp_path}/c2", code=1).stderr


def run_killed(flags: list[str], seconds: float) -> bool:
    """Start eval_math.py, kill it after so many seconds; whether it had ended before."""
    child = subprocess.Popen([sys.executable, str(ROOT / "eval_math.py"), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        return child.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return False


def kill_and_resume(sums, models, tmp_path, n_kills: int) -> None:
    flags = [f"--benchmark={sums}/test.jsonl", f"--shots={sums}/train.jsonl", "--n_shots=2", "--max_new=48", "--k=2", "--block=1", f"--model={models}/latent"]
    begin = time.time()
    script("eval_math.py", *flags, f"--out_dir={tmp_path}/whole")
    whole, kills = time.time() - begin, 0
    rng = np.random.default_rng(0)
    while kills < n_kills:
        if run_killed([*flags, f"--out_dir={tmp_path}/cut"], float(rng.uniform(0.5, 1.0)) * whole):
            shutil.rmtree(tmp_path / "cut")  # it was done: begin anew
            continue
        kills += 1
        partial = tmp_path / "cut/responses.partial.jsonl"
        if kills % 3 == 0 and partial.exists():  # as if the kill had come in the middle of a line
            partial.write_bytes(partial.read_bytes()[:-7])
    script("eval_math.py", *flags, f"--out_dir={tmp_path}/cut")
    for name in ("results.json", "responses.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((tmp_path / "cut").glob("*partial*")) and not list((tmp_path / "cut").glob("*.tmp"))


def test_killed_and_resumed_gives_the_same_files(sums, models, tmp_path):
    kill_and_resume(sums, models, tmp_path, 2)


@pytest.mark.slow
def test_killed_ten_times_gives_the_same_files(sums, models, tmp_path):
    kill_and_resume(sums, models, tmp_path, 10)


def test_fine_tuning_learns_the_completion_and_is_evaluated(sums, models, tmp_path):
    """train.py on the training problems in both formats: figures of each seed, their mean and spread; the same command is complete."""
    for mode, n_seeds in (("raw", 1), ("latent", 2)):
        flags = [f"--benchmark={sums}/test.jsonl", f"--train_file={sums}/train.jsonl", "--finetune", f"--seeds={n_seeds}", "--epochs=2", "--k=2", "--max_new=40",
                 f"--mode={mode}", f"--model={models}/{mode}", "--train=--lr=1e-3 --batch_size=8", f"--out_dir={tmp_path}/{mode}"]  # fmt: skip
        script("eval_math.py", *flags)
        results = json.loads((tmp_path / mode / "results.json").read_text())
        assert len(results["mean of k samples"]["seeds"]) == n_seeds and (results["greedy"]["sd"] is None) == (n_seeds == 1) and results["n"] == 12
        training = json.loads((tmp_path / mode / "seed0/model/settings.json").read_text())
        assert training["loss"] == "completion" and training["seed"] == 0 and training["lr"] == 1e-3
        corpus = open_corpus(tmp_path / mode / "data/corpus")
        assert corpus.n_docs == 28 and corpus.questions.tolist() == [True, False] * 28
        assert ("=" in corpus.tokenizer.decode(corpus.chunk(1))) == (mode == "raw")  # where the solution stands
    evaluated = json.loads((tmp_path / "latent/seed1/eval/results.json").read_text())
    assert evaluated["n_shots"] == 0 and evaluated["sampled"]["k"] == 2
    assert script("eval_math.py", *flags).stdout.count("complete") == 4


@pytest.mark.parametrize("flags,said", [
    ([], "give one of --benchmark"), (["--benchmark=gsm8k", "--corpus=c"], "give one of"), (["--benchmark=gsm8k"], "--model=... is required"),
    (["--benchmark=gsm8k", "--model=m", "--mode=raw", "--max_thought=5"], "--max_thought=5"), (["--corpus=c", "--model=m", "--finetune"], "--finetune: needs --benchmark"),
    (["--benchmark=gsm8k", "--model=m", "--shotz=3"], "--shots"), (["--compare=/nowhere"], "/nowhere"), (["--benchmark=gsm8k", f"--file={ROOT}/data/shots/gsm8k.jsonl", "--model=/nowhere"], "/nowhere"),
])  # fmt: skip
def test_wrong_flags_end_in_one_line(flags, said, tmp_path):
    stderr = script("eval_math.py", *flags, f"--out_dir={tmp_path}/e", code=1).stderr
    assert said in stderr and len(stderr.strip().splitlines()) == 1 and "Traceback" not in stderr


def test_a_corpus_without_questions_is_refused(models, tmp_path):
    _, tok = train.load_model(models / "raw")
    write_corpus(tmp_path / "plain", [[("Add 3.", False)]], tok, {})
    done = script("eval_math.py", f"--corpus={tmp_path}/plain", f"--model={models}/raw", f"--out_dir={tmp_path}/e", code=1)
    assert "has no questions" in done.stderr


@pytest.mark.slow
def test_smollm2_answers_gsm8k_as_transformers_does():
    """tests/bench_eval.py with 12 problems: token-identical greedy responses, the same score."""
    if not SHARED.exists():
        pytest.skip("needs ../shared/data/gsm8k and ../shared/tools")
    model = os.environ.get("SMOLLM2_MARKED", "/tmp/smolmark")
    if not os.path.exists(model):
        pytest.skip(f"{model}: make it by ../shared/tools/smollm2_hf.py and train.py --init_from=... --max_steps=0 --out_dir={model}")
    done = script("tests/bench_eval.py", f"--model={model}", f"--file={SHARED}/data/gsm8k/test.jsonl", "--problems=12", "--max_new=64", timeout=1800)
    assert "token-identical: 12 of 12" in done.stdout
