"""Grading, accuracy by generation, likelihood."""

import json

import numpy as np
import pytest
import torch
from conftest import TOY, corpus_of, script

import train
from eval_math import Settings, accuracy, answer, extract_answer, grade, problems_of, text_nll
from infer_thoughts import Engine


@pytest.mark.parametrize("response,gold,right", [
    (" The last digit is 9.", " The last digit is 9.", True), ("9", " The last digit is 9.", True), (" The last digit is 8.", "9", False),
    ("The answer is 1,234.", "The answer is 1234.", True), ("is 18.00", "18", True), ("is 1/2", "0.5", True), ("is 1/0", "0", False),
    ("is -3", "3", False), ("", "9", False), ("no number", "9", False), ("9\n\nQuestion: 5", "9", True), ("7, so 9", "9", True), ("9", "", False),
    ("9" * 5000, "9", False), ("__import__('os')", "9", False),
])  # fmt: skip
def test_grade(response, gold, right):
    assert grade(response, gold) == right


def test_extract_answer():
    assert extract_answer(" The answer is 72.\nmore 5") == "72" and extract_answer("none") is None and extract_answer("") is None


def test_problems_follow_their_question():
    corpus = corpus_of([[[0], [1], [0], [1]], [[0]], [[1], [1]]], questions=[True, False, True, False, True, False, False])
    assert problems_of(corpus).tolist() == [1, 3]  # a question that ends its document is followed by nothing


def test_text_nll_equals_the_whole_document(toy_model):
    """By the chain rule, the chunks' conditional NLLs add up to that of the document."""
    corpus = corpus_of([[[0, 1], [1], [0, 0, 1]]])
    got = text_nll(Engine(toy_model), TOY, corpus, np.arange(3), Settings(corpus="", model="", out_dir=""))
    ids = torch.tensor([[TOY.bos, 0, 1, 1, 0, 0, 1]])
    log_p = torch.log_softmax(toy_model.logits(toy_model(ids))[0], -1)
    assert got.sum() == pytest.approx(-log_p[range(6), ids[0, 1:]].sum().item(), abs=1e-4)


def test_accuracy_counts():
    records = [{"correct": c, "cut_off": not c, "extracted": None if not c else "1"} for c in (True, True, True, False)]
    assert accuracy(records) == {"accuracy": 0.75, "accuracy_se": pytest.approx(0.2165, abs=1e-4), "n": 4, "cut_off": 1, "no_answer": 1}


@pytest.fixture(scope="module")
def models(digits, tmp_path_factory):
    """A latent and a raw model that know the 40 warm documents by heart."""
    out = tmp_path_factory.mktemp("models")
    quick = ["--max_steps=250", "--batch_size=16"]
    script("train.py", f"--corpus={digits}/warm", f"--thoughts={digits}/warm_thoughts", f"--out_dir={out}/latent", *quick)
    script("train.py", f"--corpus={digits}/warm", f"--out_dir={out}/raw", *quick)
    return out


def test_learned_documents_are_answered(digits, models, tmp_path):
    """End to end: what was trained on is thought, answered and graded right; a latent model asked the raw way is not better."""
    flags = [f"--corpus={digits}/warm", "--max_new=40"]
    script("eval_math.py", *flags, f"--model={models}/latent", f"--out_dir={tmp_path}/l", f"--thoughts={digits}/warm_thoughts")
    script("eval_math.py", *flags, f"--model={models}/raw", f"--out_dir={tmp_path}/r", "--mode=raw")
    latent, raw = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("l", "r"))
    assert latent["accuracy"] > 0.9 and raw["accuracy"] > 0.9 and latent["n"] == raw["n"] == 40
    assert latent["pick_right"] > 0.8 and latent["nll_bound"].keys() == {"1", "4", "16"} and "nll" in raw
    bounds = [latent["nll_bound"][k] for k in ("1", "4", "16")]
    assert bounds[0] > bounds[1] > bounds[2] > 0
    lines = [json.loads(line) for line in (tmp_path / "l/responses.jsonl").read_text().splitlines()]
    assert len(lines) == 40 and sum(r["correct"] for r in lines) == latent["accuracy"] * 40
    assert all(r["thought"].count("=") >= 1 and "digit" in r["response"] for r in lines if r["correct"])
    assert "complete" in script("eval_math.py", *flags, f"--model={models}/raw", f"--out_dir={tmp_path}/r", "--mode=raw").stdout


def test_thoughts_that_do_not_end_are_wrong_and_counted(digits, models, tmp_path):
    model, tok = train.load_model(models / "latent")
    from data.corpus import open_corpus

    corpus = open_corpus(digits / "warm", tok)
    s = Settings(corpus="", model="", out_dir="", max_new=2, max_answer=1)
    records = answer(Engine(model), tok, corpus, problems_of(corpus), s, greedy=True)
    assert all(r["cut_off"] and not r["correct"] and r["response"] == "" for r in records)


def test_a_corpus_without_questions_is_refused(models, tmp_path):
    from data.corpus import write_corpus

    _, tok = train.load_model(models / "raw")
    write_corpus(tmp_path / "plain", [[("Add 3.", False)]], tok, {})
    done = script("eval_math.py", f"--corpus={tmp_path}/plain", f"--model={models}/raw", f"--out_dir={tmp_path}/e", code=1)
    assert "has no questions" in done.stderr
