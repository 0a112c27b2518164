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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, TOY, corpus_of, inside, script

import eval_math
import train
from data import digits as digits_maker
from data.lib import grader, problems
from data.lib.cli import UserError
from data.lib.corpus import PRIOR, RAW, chunks_of, layout, open_corpus, open_thoughts, write_corpus
from data.lib.engine import Engine
from data.lib.finetune import training_flags, training_problems
from data.lib.problems import Item, choose_shots, read_item, read_items
from data.lib.responses import answers_end_with_line, first_line
from data.lib.scores import paired, paired_difference, pass_at, scores, sign_test
from data.lib.tokenizer import load_tokenizer, make_tokenizer
from eval_math import (
    GREEDY,
    Problem,
    Responder,
    Settings,
    answer_block,
    benchmark_problems,
    choose_scored,
    corpus_problems,
    few_shot_prompt,
    likelihood,
    text_nll,
)
from infer_thoughts import NO_THOUGHT, Limits, can_think


def settings(**values) -> Settings:
    return Settings(out_dir="", **{"max_new": 40} | values)


def respond(engine, tok, problems, s, one_line=False):
    """The greedy responses of a scripted engine."""
    return Responder(engine, tok, s, None, one_line).respond(problems, GREEDY)


# ------------------------------------- reading problems


def test_rows_of_all_benchmarks_are_read():
    gsm = read_item({"question": " How many? ", "answer": "2 + 3 = <<2+3=5>>5\nSo 5.\n#### 5"})
    assert gsm == Item("How many?", "2 + 3 = 5\nSo 5.", "5", {})
    solution = "We get $\\boxed{\\frac{1}{2}}$."
    math_row = read_item(
        {"problem": "Find $x$.", "solution": solution, "level": "Level 3", "type": "Algebra"}
    )
    assert math_row == Item("Find $x$.", solution, "\\frac{1}{2}", {"level": "3", "subject": "Algebra"})
    mmlu = read_item(
        {"question": "Which?", "choices": ["a", "b", "c"], "answer": 2, "type": "physics"}
    )
    assert mmlu == Item("Which?\n(A) a\n(B) b\n(C) c", "", "C", {"subject": "physics"})
    assert read_item({"question": "How?", "answer": 7}).answer == "7"
    for bad in (
        {"question": "q"},
        {"answer": "5"},
        {"question": "", "answer": "5"},
        {"question": "q", "choices": ["a"], "answer": 3},
        {"question": 3, "answer": "5"},
    ):
        with pytest.raises(ValueError, match="field"):
            read_item(bad)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        read_item({"question": "Half \ud800 a pair?", "answer": "5"})


FOUR = {"A": "w", "B": "x", "C": "y", "D": "z"}
PRO = {"question": "q", "options": list("abcdefghij"), "answer": "I", "answer_index": 8}
BOXES = "The final answer is positive. So $\\boxed{3}$ and $\\fbox{x=\\boxed{\\frac{1}{2}}}$ in all."


@pytest.mark.parametrize("row,answer,shown", [
    (PRO, "I", "(J) j"),
    ({"question": "q", "answer": "C"} | FOUR, "C", "(D) z"),
    ({"question": "q", "answer": "B", "E": None, "F": math.nan} | FOUR, "B", "(D) z"),
    ({"question": "q", "choices": ["a", 2.5], "answer": 1.0}, "B", "(B) 2.5"),
    ({"question": "q", "choices": None, "answer": "0"}, "0", "q"),
    ({"problem": "p", "solution": BOXES}, "\\frac{1}{2}", "p"),
    ({"question": "q", "answer": 10**400}, "1" + "0" * 400, "q"),
])  # fmt: skip
def test_published_rows_are_read_right(row, answer, shown):
    item = read_item(row | {"level": math.nan})
    assert item.answer == answer and item.question.endswith(shown) and not item.about


@pytest.mark.parametrize("row,said", [
    (PRO | {"options": list("abcdefghijkl")}, "there are 12 choices, at most 10"),
    (PRO | {"options": {"text": ["a"]}}, "is no list"),
    (PRO | {"options": ["a", math.nan, *"cdefghij"]}, "one is empty"),
    (PRO | {"answer": "K"}, "none of the choices"),
    (PRO | {"answer": "BC"}, "none of the choices"),
    (PRO | {"answer": 1.5}, "none of the choices"),
    (PRO | {"answer": True}, "none of the choices"),
    ({"question": "q", "answer": "D"} | FOUR | {"C": ""}, "one is empty"),
    ({"question": "q", "answer": math.nan}, "neither text nor a number"),
    ({"question": "q", "answer": -math.inf}, "neither text nor a number"),
    ({"question": "q", "answer": False}, "neither text nor a number"),
    ({"question": math.nan, "answer": "1"}, "no text"),
    ({"problem": "p", "solution": "$\\boxed{2}$, no: $\\boxed{}$"}, "last .boxed, or it is empty"),
    ({"problem": "p", "solution": "$\\boxed{2$"}, "last .boxed, or it is empty"),
])  # fmt: skip
def test_what_is_no_problem_is_refused_with_its_line(row, said, tmp_path):
    good = json.dumps({"question": "q", "answer": "1"})
    (tmp_path / "a.jsonl").write_text(f"{good}\n\n{json.dumps(row)}")
    (tmp_path / "a.json").write_text(f"[{good},{json.dumps(row)}]")
    for place in ("a.jsonl:3", "a.json:2"):
        with pytest.raises(UserError, match=f"{place}: .*{said}"):
            read_items(tmp_path / place.partition(":")[0])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "b.csv", "list.json"])
def test_a_mark_at_the_start_and_blank_lines_are_no_error(name, tmp_path):
    rows = [{"question": "Is it, so?", "answer": "B"} | FOUR] * 2
    text = "\n\n".join(map(json.dumps, rows))
    if name == "list.json":
        text = json.dumps(rows, indent=1)
    if name.endswith("csv"):
        head = {"a.csv": "Question,A,B,C,D,Answer\n\n", "b.csv": ""}[name]
        text = head + '"Is it, so?",w,x,y,z,B\n\n' * 2
    (tmp_path / name).write_text(f"\ufeff{text}\n\n", encoding="utf-8")
    asked = "Is it, so?\n(A) w\n(B) x\n(C) y\n(D) z"
    assert read_items(tmp_path / name) == [Item(asked, "", "B", {})] * 2


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
        problems.find_file(settings(benchmark="gsm8k", file=str(tmp_path / "no.jsonl")), "test")
    with pytest.raises(UserError, match="is one of gsm8k"):
        problems.find_file(settings(benchmark="gsm9k"), "test")


def test_parquet_is_read_like_jsonl(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {"question": "Which?", "choices": ["a", "b"], "answer": 1},
        {"question": "And?", "choices": ["c", "d"], "answer": 0},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_items(tmp_path / "t.parquet") == read_items(tmp_path / "t.jsonl")
    (tmp_path / "bad.parquet").write_text("nothing")
    with pytest.raises(UserError, match="not a parquet file"):
        read_items(tmp_path / "bad.parquet")


def test_shots_by_seed_and_never_a_tested_problem(tmp_path):
    rows = [{"question": f"q{i}", "solution": f"s{i}", "answer": str(i)} for i in range(20)] + [
        {"question": "unsolved", "answer": "1"}
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    tested = [Item("q3", "", "3", {})]
    s = settings(benchmark="gsm8k", shots="train", train_file=str(path), n_shots=19)
    chosen = [choose_shots(replace(s, seed=seed), tested) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert sorted(x.question for x in chosen[0]) == sorted(f"q{i}" for i in range(20) if i != 3)
    with pytest.raises(UserError, match="19 examples"):
        choose_shots(replace(s, n_shots=20), tested)
    assert [
        x.question for x in choose_shots(settings(benchmark="gsm8k", shots=str(path), n_shots=2), [])
    ] == ["q0", "q1"]
    assert choose_shots(settings(benchmark="mine.jsonl"), []) == []
    with pytest.raises(UserError, match="no examples of ours"):
        choose_shots(settings(benchmark="mine.jsonl", n_shots=2), [])


@pytest.mark.parametrize("name,n", [("gsm8k", 8), ("math", 4), ("math500", 4), ("mmlu_stem", 4)])
def test_our_own_examples_grade_true_against_their_answers(name, n):
    shots = choose_shots(settings(benchmark=name), [])
    assert len(shots) == n
    for x in shots:
        written = x.solution + x.answer_text
        assert grader.judge(written, x.answer) == {
            "extracted": grader.extract_answer(written),
            "correct": True,
            "strict": True,
            "graded": True,
        }


@pytest.mark.parametrize(
    "name,file",
    [
        ("gsm8k", "gsm8k/test.jsonl"),
        ("math", "math/sample50.jsonl"),
        ("mmlu_stem", "mmlu_stem/sample300.jsonl"),
    ],
)
def test_prompts_leave_room_in_2048_tokens(name, file):
    """All examples, the longest question, 512 new tokens and an answer, in Llama 2's tokens."""
    if not SHARED.exists():
        pytest.skip("needs ../shared/data")
    tok = load_tokenizer(SHARED / "data/llama2/tokenizer.json")
    for mode in ("raw", "latent"):
        s = settings(benchmark=name, file=str(SHARED / "data" / file), mode=mode, max_new=512)
        problems, counts = benchmark_problems(s, tok, 2048)
        assert counts["dropped_shots"] == counts["too_long"] == 0
        assert counts["n_shots"] == {"gsm8k": 8}.get(name, 4)
        assert max(len(p.prompt) for p in problems) <= 2048 - 512 - 32


# ------------------------------------- prompts

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
    """Token by token what layout() writes for such a document in training, up to the thought."""
    chunks, thoughts = [], []
    for x in [*SHOTS, ASKED]:
        chunks += [tok.encode(x.question_text), tok.encode(x.answer_text + "\n\n")]
        thoughts += [[], tok.encode(x.solution)]
    whole, parts = layout(tok, chunks, thoughts, [RAW, PRIOR] * 3)
    prompt = few_shot_prompt(tok, SHOTS, ASKED, "latent").tolist()
    assert prompt == whole[: parts[-1].thought[0]].tolist()
    assert [t for t in prompt if t in (tok.bos, tok.eos, tok.sol, tok.eol, tok.pri, tok.pos)] == [
        tok.bos,
        *[tok.sol, tok.pri, tok.eol] * 2,
        tok.sol,
        tok.pri,
    ]
    assert prompt[-2:] == [tok.sol, tok.pri]


def test_prompts_that_do_not_fit_are_refused_or_lose_examples(tok, tmp_path):
    path, shots = tmp_path / "test.jsonl", tmp_path / "shots.jsonl"
    path.write_text(
        json.dumps({"question": ASKED.question, "answer": "2"})
        + "\n"
        + json.dumps({"question": "very long " * 60, "answer": "2"})
        + "\n"
    )
    shots.write_text(
        "".join(
            json.dumps({"question": x.question, "solution": x.solution, "answer": x.answer}) + "\n"
            for x in SHOTS
        )
    )
    s = settings(benchmark=str(path), shots=str(shots), n_shots=2, mode="raw", max_new=8)
    both, one, none = (len(few_shot_prompt(tok, SHOTS[n:], ASKED, "raw")) for n in range(3))
    long = len(few_shot_prompt(tok, [], read_items(path)[1], "raw"))
    assert none < one < both < long
    with pytest.raises(UserError, match="problem 0: 2 examples and the question are .* tokens"):
        benchmark_problems(s, tok, both + 7)
    problems, counts = benchmark_problems(replace(s, drop_shots=True), tok, both + 7)
    assert problems[0].about["n_shots"] == 1 and len(problems[0].prompt) == one
    assert counts["dropped_shots"] == 1 + 2
    assert counts["too_long"] == 1
    assert len(problems[1].prompt) == 0
    assert benchmark_problems(replace(s, limit=1), tok, both + 8)[1]["dropped_shots"] == 0


def test_problems_of_a_corpus_follow_their_question(tok):
    corpus = corpus_of(
        [[[0], [1], [0], [1]], [[0]], [[1], [1]]], questions=[True, False, True, False, True, False, False]
    )
    corpus.tokenizer = tok
    problems, _ = corpus_problems(settings(corpus="c"), corpus, 128)
    assert [p.key for p in problems] == [1, 3]  # a question that ends its document is followed by nothing
    assert problems[1].prompt.tolist() == [tok.bos, 0, 1, 0, tok.sol, tok.pri]
    assert corpus_problems(settings(corpus="c", mode="raw", before=1), corpus, 128)[0][1].prompt.tolist() == [
        tok.bos,
        0,
    ]
    without = corpus_of([[[0], [1]]])
    assert corpus_problems(settings(corpus="c"), without, 128) == ([], {"answers_too_long": 0})


# ------------------------------------- responses


class Scripted:
    """An engine that says what it is told to: {prompt as a tuple: text or ids}."""

    def __init__(self, said: dict):
        self.said, self.calls = said, []

    def generate(self, prompts, keys, samples, sampling, on_tokens=None, ends=None):
        self.calls.append((prompts, list(keys), sampling, {"ends": ends}))
        max_new, stop = sampling.max_new, sampling.stop
        out = []
        for p in prompts:
            ids = self.said[tuple(int(t) for t in p)]
            end = next((i + 1 for i, t in enumerate(ids) if t in stop), None)
            out.append(
                [(np.array(ids[: end or max_new][:max_new]), end is not None and end <= max_new, 0.0)]
                * samples
            )
        return out


def test_latent_responses_and_budget_forcing(tok):
    """A thought that ends, one that is cut off or closed, a problem that did not fit."""
    thought, answer = tok.encode("2 + 3 = 5."), tok.encode("The final answer is 5.")
    good, endless, n = [tok.bos, 1], [tok.bos, 2], len(tok.encode("2 + 3 = 5."))
    said = {tuple(good): [*thought, tok.eol, *answer, tok.eos], tuple(endless): thought * 50}
    for budget in (n + 1, n - 1):
        said |= {
            (*p, *ids[:budget], tok.eol): [*answer, tok.eos]
            for p, ids in ((good, thought), (endless, thought * 50))
        }
    problems = [
        Problem(0, np.array(good), "5"),
        Problem(1, np.array(endless), "5"),
        Problem(2, np.array([], int), "5"),
    ]
    s = settings(benchmark="x", max_new=n + 1)
    [a], [b], [c] = respond(Scripted(said), tok, problems, s)
    assert (a["thought"], a["response"], a["cut_off"], a["tokens"]) == (
        tok.decode(thought),
        tok.decode(answer),
        False,
        n + 1 + len(answer),
    )
    assert b["cut_off"] and b["response"] == "" and not b["forced"]
    assert c == {"response": "", "tokens": 0, "cut_off": True, "forced": False}
    [a], [b], _ = respond(Scripted(said), tok, problems, replace(s, max_thought=n + 1))
    assert not a["forced"] and b["forced"] and not b["cut_off"]
    assert (b["thought"], b["response"], b["tokens"]) == (
        tok.decode((thought * 50)[: n + 1]),
        tok.decode(answer),
        n + 2 + len(answer),
    )
    [a], [b], _ = respond(Scripted(said), tok, problems, replace(s, max_thought=n - 1))
    assert (
        a["forced"] and b["forced"] and a["thought"] == tok.decode(thought[: n - 1])
    )  # one that would have ended later is closed, too


def test_raw_responses_stop_where_told(tok):
    text = tok.encode("It is 5.\nThe final answer is 5.\n")
    engine = Scripted({(tok.bos, 1): [*text, tok.eos]})
    [[r]] = respond(
        engine,
        tok,
        [Problem(0, np.array([tok.bos, 1]), "5")],
        settings(benchmark="x", mode="raw", max_new=99),
    )
    assert r == {"response": tok.decode(text), "tokens": len(text), "cut_off": False, "forced": False}
    ends = engine.calls[0][3]["ends"]
    assert ends(np.array(text))
    answer = "So the final answer is"
    for text, over in {
        "so.\n\nProblem: next": True,
        "so.\n** Question: next": True,
        "Problem: next": True,
        f"{answer} 5": False,
        f"{answer}:\n\n": False,
        f"{answer}:\n\n5.": False,
        f"{answer}:\n\n5.\n": True,
        f"{answer}\n\\[\n5\n": False,
        f"{answer}\n\\[\n5\n\\]\n": True,
        f"{answer} $$x =\n": False,
        f"{answer} $$x =\n5$$.\n": True,
        f"{answer}\n\\begin{{array}}5\n": False,
        f"{answer}\n\\begin{{array}}5\n\\end{{array}}\n": True,
        "Now the Question: is it odd? Word Problem: 5": False,
        "long " * 60 + "so the Question:" + " is" * 47: False,
    }.items():
        ids = np.array(tok.encode(text))
        assert any(ends(ids[:n]) for n in range(1, len(ids) + 1)) == over, text


# ------------------------------------- where a corpus's answers end


def written_corpus(folder, documents, texts):
    """(corpus, tokenizer) of documents of (question, thought, answer), on disk."""
    tok = make_tokenizer(texts, 300)
    write_corpus(folder, map(chunks_of, documents), tok, {})
    return open_corpus(folder), tok


@pytest.mark.parametrize(
    "text,kept",
    [
        (" is 9.\nStart at", " is 9."),
        ("\nIt is 9.\nTom has", "\nIt is 9."),
        (" is 9.", " is 9."),
        ("\n \n", "\n \n"),
        ("", ""),
        ("9\n", "9"),
    ],
)
def test_the_first_line_that_says_something(text, kept):
    assert first_line(text) == kept


def test_where_the_answers_of_a_corpus_end(tmp_path):
    """Only where the corpus shows that a new line follows an answer, and no answer has one inside."""
    one, two = ("Add 3.", "", " It is 9."), ("Tom has 3.", "", "\nThe answer is 9.")
    long = ("Tom has 3.", "", "\n3 + 6 = 9.\nThe answer is 9.")
    corpora = {"several": [[one, one], [two]], "alone": [[one], [two]], "long": [[one, two], [long]]}
    found = {}
    for name, documents in corpora.items():
        corpus, tok = written_corpus(tmp_path / name, documents, ["Add 3.\n It is 9."])
        found[name] = answers_end_with_line(corpus)
    assert found == {"several": True, "alone": False, "long": False}
    write_corpus(
        tmp_path / "same",
        [[("Add 3.", True), (" It is 9.", False), (" Add 4.", True), (" 3.", False)]],
        tok,
        {},
    )
    assert not answers_end_with_line(open_corpus(tmp_path / "same"))


@pytest.mark.parametrize("mode", ["raw", "latent"])
def test_a_response_that_runs_on_is_cut_where_its_answer_ends(mode, tmp_path):
    """--problems=3: a model answers and goes on with the next problem, as documents do."""
    s = digits_maker.Settings(out_dir="", warm=2, raw=1, heldout=4, problems=3)
    documents = digits_maker.make_documents(s)
    corpus, tok = written_corpus(
        tmp_path / "c", documents["heldout"], [t for d in documents["warm"] for x in d for t in x]
    )
    s = settings(corpus="c", mode=mode, max_answer=40, context="bare", max_thought=0)
    problems, _ = corpus_problems(s, corpus, 512)
    assert answers_end_with_line(corpus) and len(problems) == 12
    thought = [*tok.encode(" 3 + 4 = 7."), tok.eol] if mode == "latent" else []
    said = {tuple(p.prompt): [*thought, *tok.encode(p.gold + "\nStart at 4. Add 5.")] for p in problems}
    engine = Scripted(said)
    judge = SimpleNamespace(ask=lambda name, *args: getattr(grader, name)(*args))
    records = answer_block(Responder(engine, tok, s, judge, one_line=True), problems)
    got = [r["responses"][0] for r in records]
    assert [x["response"] for x in got] == [p.gold for p in problems]
    assert all(x["correct"] for x in got)
    assert not any(x["cut_off"] for x in got)
    ends = engine.calls[0][3]["ends"]
    last, start = tok.encode(problems[0].gold), tok.encode("\nSt")
    assert ends(np.array([*thought, *last, *start]))
    assert not ends(np.array([*thought, *last]))
    assert not ends(np.array([*thought, *tok.encode("\n The last")]))
    assert mode == "raw" or not ends(
        np.array(tok.encode(" 3 + 4 = 7.\n 7"))
    )  # a line end in a thought ends nothing
    without = answer_block(Responder(engine, tok, s, judge), problems)
    assert engine.calls[-1][3]["ends"] is None
    assert not any(r["responses"][0]["correct"] for r in without if r["gold"][-2] != "5")


def test_a_closed_thought_is_answered_in_one_line(tok):
    """--max_thought on a corpus: a forced answer ends where others do."""
    thought, s = (tok.encode("2 + 3 = 5."), settings(corpus="c", max_new=8, max_thought=4, max_answer=40))
    answer = tok.encode(" It is 5.\nWhat is 4 + 4?")
    engine = Scripted({(tok.bos, 1): thought * 50, (tok.bos, 1, *thought[:4], tok.eol): answer})
    [[r]] = respond(engine, tok, [Problem(0, np.array([tok.bos, 1]), "5")], s, one_line=True)
    assert (r["response"], r["forced"], r["cut_off"]) == (" It is 5.", True, False)
    assert engine.calls[1][3]["ends"](np.array(answer))


# ------------------------------------- scores


def response(right, extracted="1", **more):
    return {
        "correct": right,
        "strict": right,
        "extracted": extracted,
        "cut_off": False,
        "forced": False,
        "graded": True,
    } | more


def test_scores_of_a_known_table():
    records = [
        {
            "level": "1",
            "responses": [
                response(True),
                response(True, "5"),
                response(False, "6"),
                response(False, "6"),
                response(True, "5"),
            ],
            "alike": [0, 1, 1, 0],
        },
        {
            "level": "2",
            "responses": [response(False, None, cut_off=True), *[response(False, x) for x in "7788"]],
            "alike": [0, 0, 2, 2],
        },
    ]
    got = scores(records, 4)
    assert got["accuracy"] == got["exact_match,flexible-extract"] == 0.5 and got[
        "accuracy_se"
    ] == pytest.approx(0.5)  # sd .707 / sqrt 2
    assert (got["n"], got["cut_off"], got["no_answer"], got["not_graded"]) == (2, 1, 1, 0)
    sampled = got["sampled"]
    assert sampled["accuracy"] == 0.25
    assert sampled["pass@1"] == 0.25
    assert sampled["pass@4"] == 0.5
    assert sampled["pass@2"] == pytest.approx(
        (1 - 1 / 6) / 2
    )  # two wrong of two wrong ones among four: 1 of 6 pairs
    assert sampled["maj@4"] == 0.5 and sampled["maj@2"] == 0.5  # 5, 6, 6, 5: the one that came first
    assert got["by_level"] == {"1": {"n": 1, "accuracy": 1.0}, "2": {"n": 1, "accuracy": 0.0}}


def test_pass_at_is_unbiased():
    """Its mean over all draws of n responses is the chance that one of k is right."""
    p, n = 0.3, 6
    for k in (1, 2, 5):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


def test_significance():
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 6) == pytest.approx(2 / 64)
    assert sign_test(6, 0) == sign_test(0, 6)
    a, b = {str(i): i < 5 for i in range(10)}, {str(i): i < 8 for i in range(10)}
    got = paired(a, b)
    assert got["difference"] == pytest.approx(0.3)
    assert (got["only_first"], got["only_second"]) == (0, 3)
    assert got["p"] == 0.25
    assert got["difference_se"] == pytest.approx(np.std([0] * 7 + [1] * 3, ddof=1) / math.sqrt(10))


# ------------------------------------- likelihood


def test_text_nll_equals_the_whole_document(toy_model):
    """By the chain rule, the chunks' conditional NLLs add up to that of the document."""
    corpus = corpus_of([[[0, 1], [1], [0, 0, 1]]])
    got = text_nll(Engine(toy_model), corpus, np.arange(3), Limits(3, 40, 128))
    ids = torch.tensor([[TOY.bos, 0, 1, 1, 0, 0, 1]])
    log_p = torch.log_softmax(toy_model.logits(toy_model(ids))[0], -1)
    assert got.sum() == pytest.approx(-log_p[range(6), ids[0, 1:]].sum().item(), abs=1e-4)


def decode_letters(ids, first=True) -> bytes:
    return bytes(b"ab"[i] for i in ids)


LETTERS = SimpleNamespace(**vars(TOY) | {"decode_bytes": decode_letters})  # a byte a letter


def toy_corpus(long: int = 0):
    """Documents of questions and answers; `long`: one more with so long an answer."""
    rng = np.random.default_rng(5)
    documents = []
    for n in (1, 2, 1, 2, 2, 1):
        a, b, c = rng.integers(0, 2, 3).tolist()
        documents.append([[a, b], [b, a, c]] * n)
    documents += [[[0, 1], [1] * long]] if long else []
    corpus = corpus_of(documents, [True, False] * sum(len(d) // 2 for d in documents))
    corpus.tokenizer = LETTERS
    return corpus


def measure(model, corpus, **values):
    s = settings(
        **{"corpus": "c", "max_new": 4, "bound_docs": 0, "min_gain": 0.0, "context": "bare"} | values
    )
    return likelihood(Engine(model), corpus, s)


def test_raw_and_latent_models_are_scored_alike(toy_model):
    """The same chunks, tokens and givens: a model's raw NLL is its nll_alone. Questions stand apart."""
    corpus = toy_corpus()
    (raw, of_raw), (latent, of_latent) = (measure(toy_model, corpus, mode=mode) for mode in ("raw", "latent"))
    counts = ("bound_docs", "bound_chunks", "bytes", "tokens", "question_bytes", "too_long", "short_context")
    assert {k: raw[k] for k in counts} == {k: latent[k] for k in counts}
    assert (raw["bytes"], raw["question_bytes"], raw["bound_docs"]) == (9 * 3, 9 * 2, 6)
    for unit in ("", "_token", "_document"):
        assert raw["nll" + unit] == pytest.approx(latent["nll_alone" + unit], abs=1e-6)
    assert raw["nll_questions"] == pytest.approx(latent["nll_questions"], abs=1e-6)
    numbers = np.flatnonzero(~corpus.questions)
    assert raw["nll"] * 27 == pytest.approx(
        text_nll(Engine(toy_model), corpus, numbers, Limits(3, 4, toy_model.config.seq_len)).sum()
    )
    for arrays in (of_raw, of_latent):
        assert arrays["doc"].tolist() == list(range(6))
        assert arrays["bytes"].tolist() == [3, 6, 3, 6, 6, 3] == arrays["tokens"].tolist()
    assert of_raw.keys() == {"doc", "bytes", "tokens", "nll", "questions"}
    assert of_latent.keys() == {
        "doc",
        "bytes",
        "tokens",
        "thoughtless",
        "alone",
        "bound_1",
        "bound_4",
        "bound_16",
        "questions",
    }
    assert of_raw["nll"].sum() == pytest.approx(raw["nll_document"] * 6)
    assert of_raw["questions"].sum() == pytest.approx(raw["nll_questions"] * 18)
    for k in ("1", "4", "16"):
        assert (
            of_latent[f"bound_{k}"].sum()
            == pytest.approx(latent["nll_bound"][k] * 27)
            == pytest.approx(latent["nll_bound_token"][k] * 27)
        )
    assert np.allclose(of_latent["alone"], of_raw["nll"])


def test_no_cut_off_improves_a_bound(toy_model):
    """The same samples, some with weight 0: bounds stay finite and get worse."""
    corpus, got = toy_corpus(), {}
    for max_new in (6, 4, 3, 2, 1):
        got[max_new] = measure(toy_model, corpus, max_new=max_new)
    shares = [figures["cut_off_share"] for figures, _ in got.values()]
    assert shares == sorted(shares) and shares[-1] > shares[0] + 0.5
    for k in ("1", "4", "16"):
        bounds = [figures["nll_bound"][k] for figures, _ in got.values()]
        assert np.isfinite(bounds).all()
        assert all(a <= b + 1e-6 for a, b in zip(bounds, bounds[1:]))
        assert bounds[-1] > bounds[0]
    bounds = [got[1][0]["nll_bound"][k] for k in ("1", "4", "16")]
    assert bounds[0] >= bounds[1] >= bounds[2]


def test_chunks_with_all_thoughts_cut_off_count_as_the_mixture_says(toy_model, monkeypatch):
    """No thought ends: for every k -log(p(x|c) + e p(SOL|c) p(x|c, SOL EOL)), above the thoughtless."""
    known = {}

    def infer_nothing(*args, **how):
        got = known["got"] = infer(*args, **how)
        got.log_w[:], got.finished[:], got.pick[:] = -np.inf, False, -1
        return got

    infer = eval_math.infer
    monkeypatch.setattr(eval_math, "infer", infer_nothing)
    figures, arrays = measure(toy_model, toy_corpus())
    got = known["got"]
    by_hand = -np.log(np.exp(got.log_alone) + NO_THOUGHT * np.exp(got.log_sol + got.log_none)).sum()
    for k in (1, 4, 16):
        assert arrays[f"bound_{k}"].sum() == pytest.approx(by_hand)
        assert figures["nll_bound"][str(k)] > figures["nll_thoughtless"]
        assert (arrays[f"bound_{k}"] > arrays["thoughtless"]).all()
    assert figures["cut_off_share"] == figures["no_pick_share"] == 1
    assert figures["ess"] == 0


def test_chunks_that_the_e_step_refuses_are_left_out_and_counted(toy_model):
    """The E-step's rule, around its edge: raw and latent, likelihood and accuracy leave out the same."""
    corpus, seq_len = toy_corpus(long=70), toy_model.config.seq_len
    assert can_think(corpus, 4, 80).sum() == 10
    assert can_think(corpus, 5, 80).sum() == 9
    max_new = seq_len - 6 - 69  # one token too many for the long answer
    for mode in ("raw", "latent"):
        problems, counts = corpus_problems(settings(corpus="c", mode=mode, max_new=max_new), corpus, seq_len)
        assert len(problems) == 9 and counts == {"answers_too_long": 1}
        figures, arrays = measure(toy_model, corpus, mode=mode, context="thoughts", max_new=max_new)
        assert figures["bound_chunks"] == 9
        assert (figures["too_long"], figures["docs_left_out"]) == (1, 1)
        assert arrays["doc"].tolist() == list(range(6))
        figures, arrays = measure(toy_model, corpus, mode=mode, context="thoughts", max_new=max_new - 1)
        assert figures["bound_chunks"] == 10
        assert (figures["too_long"], figures["docs_left_out"]) == (0, 0)
    asked = corpus_of([[[0] * 40, [1]]], questions=[True, False])
    asked.tokenizer = LETTERS
    for seq, n in (
        (96, 1),
        (95, 0),
    ):  # a question that has no room beside its response is not left out of its prompt
        problems, counts = corpus_problems(settings(corpus="c", max_new=17, max_answer=32), asked, seq)
        assert len(problems) == n and counts == {"answers_too_long": 1 - n}
        assert all(p.prompt.tolist().count(0) == 40 for p in problems)
    beyond = toy_corpus(long=seq_len + 5)
    for mode in ("raw", "latent"):  # with thoughts in the context this was an IndexError
        assert measure(toy_model, beyond, mode=mode, context="thoughts")[0]["too_long"] == 1
    with pytest.raises(UserError, match="no chunk of the first 7 documents can be scored"):
        choose_scored(settings(corpus="c", max_new=200, bound_docs=0), beyond, 64)


def test_one_run_gives_all_bounds_under_the_same_contexts(toy_model, monkeypatch):
    """With thoughts in the context, too: one E-step, with its picks in all contexts."""
    calls, corpus = [], toy_corpus()

    def watch(name):
        real = getattr(eval_math, name)

        def watched(*args, **how):
            calls.append((name, args, how))
            return real(*args, **how)

        monkeypatch.setattr(eval_math, name, watched)

    watch("infer"), watch("text_nll")
    for samples, K in ((3, 16), (20, 20)):
        calls.clear()
        figures, _ = measure(toy_model, corpus, context="thoughts", samples=samples, min_gain=-0.5)
        assert [name for name, _, _ in calls] == ["infer", "text_nll"]
        e_step, picked = calls[0][1][3:5]
        assert e_step.samples == K
        assert e_step.min_gain == -0.5
        assert e_step.context == "thoughts"
        assert calls[1][1][4] is picked and len(picked) > 0
        assert 1 <= figures["ess"] <= samples
        bounds = [figures["nll_bound"][k] for k in ("1", "4", "16")]
        assert bounds[0] > bounds[1] > bounds[2]


def test_the_gain_rule_holds_for_the_groups_picks(toy_model):
    """--min_gain in the figures of E-steps with --samples thoughts: picks that gain less are none."""
    corpus = toy_corpus()
    shares = [
        measure(toy_model, corpus, samples=4, min_gain=g)[0]["no_pick_share"] for g in (-math.inf, 0.0, 1e9)
    ]
    assert shares[0] <= shares[1] <= shares[2] == 1 and shares[0] < 0.5


def test_paired_difference():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.0, 6.0])
    assert paired_difference(a, b) == (pytest.approx(1.0), pytest.approx(1 / math.sqrt(3)))
    assert paired_difference(b, a)[0] == pytest.approx(-1.0)
    assert paired_difference(a[:1], b[:1]) == (1.0, 0.0)


# ------------------------------------- end to end


@pytest.fixture(scope="module")
def models(digits, tmp_path_factory):
    """A latent and a raw model that know the 40 warm documents by heart."""
    out = tmp_path_factory.mktemp("models")
    quick = ["--max_steps=250", "--batch_size=16"]
    thoughts = f"--thoughts={digits}/warm_thoughts"
    inside(train, f"--corpus={digits}/warm", thoughts, f"--out_dir={out}/latent", *quick)
    inside(train, f"--corpus={digits}/warm", f"--out_dir={out}/raw", *quick)
    return out


@pytest.fixture(scope="module")
def sums(digits, tmp_path_factory):
    """A benchmark in the words of the digits corpus: (test file, file of worked examples)."""
    folder = tmp_path_factory.mktemp("bench")
    corpus = open_corpus(digits / "warm")
    thoughts, tok = open_thoughts(digits / "warm_thoughts", corpus), corpus.tokenizer
    rows = []
    for d in range(corpus.n_docs):
        first = int(corpus.docs[d])
        question, solution = (tok.decode(corpus.chunk(first)), tok.decode(thoughts.span(first + 1)))
        rows.append(
            {
                "question": question,
                "solution": solution,
                "answer": tok.decode(corpus.chunk(first + 1)).strip(" .").split()[-1],
                "level": str(d % 2),
            }
        )
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:12]))
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[12:]))
    return folder


def test_learned_documents_are_answered(digits, models, tmp_path):
    """End to end: what was trained on is thought, answered and graded right."""
    flags = [f"--corpus={digits}/warm", "--max_new=40", "--k=2", "--temperature=1", "--top_p=1"]
    # A text known by heart needs no thought: the rule of the gain would drop right picks that no longer help.
    every_pick = [f"--thoughts={digits}/warm_thoughts", "--min_gain=-inf"]
    inside(eval_math, *flags, f"--model={models}/latent", f"--out_dir={tmp_path}/l", *every_pick)
    inside(eval_math, *flags, f"--model={models}/raw", f"--out_dir={tmp_path}/r", "--mode=raw")
    latent, raw = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("l", "r"))
    assert latent["accuracy"] > 0.9
    assert raw["accuracy"] > 0.9
    assert latent["n"] == raw["n"] == 40
    assert latent["sampled"]["accuracy"] > 0.5
    assert latent["sampled"]["pass@2"] >= latent["sampled"]["pass@1"]
    assert latent["pick_right"] > 0.8
    assert latent["nll_bound"].keys() == {"1", "4", "16"}
    assert "nll" in raw
    bounds = [latent["nll_bound"][k] for k in ("1", "4", "16")]
    assert bounds[0] > bounds[1] > bounds[2] > 0
    assert latent["nll_thoughtless"] > 0
    assert latent["nll_alone"] > 0
    assert latent["nll_questions"] > 0
    counts = ("bound_docs", "bound_chunks", "bytes", "tokens", "question_bytes", "too_long", "until")
    assert {k: raw[k] for k in counts} == {k: latent[k] for k in counts}
    assert raw["bound_docs"] == raw["bound_chunks"] == 40
    for a_byte, a_token, a_document in (
        (latent["nll_bound"]["4"], latent["nll_bound_token"]["4"], latent["nll_bound_document"]["4"]),
        (raw["nll"], raw["nll_token"], raw["nll_document"]),
    ):
        assert (
            a_byte * raw["bytes"]
            == pytest.approx(a_token * raw["tokens"])
            == pytest.approx(a_document * raw["bound_docs"])
        )
    lines = [json.loads(line) for line in (tmp_path / "l/responses.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert sum(r["responses"][0]["correct"] for r in lines) == latent["accuracy"] * 40
    assert all(
        "->" in r["responses"][0]["thought"] and "digit" in r["responses"][0]["response"]
        for r in lines
        if r["responses"][0]["correct"]
    )
    assert (
        "complete"
        in inside(eval_math, *flags, f"--model={models}/raw", f"--out_dir={tmp_path}/r", "--mode=raw").stdout
    )
    done = inside(eval_math, f"--compare={tmp_path}/r,{tmp_path}/l", f"--out_dir={tmp_path}/c")
    nats = json.loads((tmp_path / "c/compare.json").read_text())["likelihood"]
    assert nats["documents"] == 40
    assert [r["name"] for r in nats["rows"]] == ["r NLL", "l thoughtless NLL", "l IWAE-16"]
    of_raw, of_latent = (dict(np.load(tmp_path / name / "likelihood.npz")) for name in ("r", "l"))
    assert str(of_raw["corpus"]) == str(of_latent["corpus"]) == open_corpus(digits / "warm").meta["sha256"]
    mean, error = paired_difference(of_raw["nll"], of_latent["bound_16"])
    [pair] = [p for p in nats["pairs"] if (p["first"], p["second"]) == ("r NLL", "l IWAE-16")]
    assert pair["difference"] == pytest.approx(mean) and error > 0
    assert pair["difference_se"] == pytest.approx(error)
    assert of_latent["bound_16"].sum() == pytest.approx(latent["nll_bound_document"]["16"] * 40)
    assert f"l IWAE-16 - r NLL: {mean:+.4f} ± {error:.4f} nats a document" in done.stdout


def test_a_benchmark_in_both_modes_and_their_comparison(sums, models, tmp_path):
    """--benchmark=FILE with --shots, --show and several models, then --compare over modes."""
    flags = [
        f"--benchmark={sums}/test.jsonl",
        f"--shots={sums}/train.jsonl",
        "--n_shots=2",
        "--max_new=48",
        "--k=3",
    ]
    done = inside(
        eval_math,
        *flags,
        f"--model={models}/latent",
        f"--out_dir={tmp_path}/l",
        "--show=1",
        "--max_thought=40",
    )
    assert "12 problems, 2 examples, prompts of" in done.stdout
    assert "tokens, 2 examples; gold:" in done.stdout
    assert done.stdout.count("<|PRIOR_PREFIX|>") == 3
    inside(
        eval_math, *flags, f"--model={models}/raw,{models}/latent", "--mode=raw", f"--out_dir={tmp_path}/r"
    )
    results = json.loads((tmp_path / "l/results.json").read_text())
    assert results["n"] == 12
    assert results["n_shots"] == 2
    assert set(results["by_level"]) == {"0", "1"}
    assert results["until"]
    assert len(results["prompt_hash"]) == 16
    assert {
        "exact_match,flexible-extract",
        "exact_match_stderr,flexible-extract",
        "exact_match,strict-match",
        "exact_match_stderr,strict-match",
    } <= set(results)
    assert (tmp_path / "r/compare.json").exists()
    assert (tmp_path / "r/raw/results.json").exists()
    done = inside(eval_math, f"--compare={tmp_path}/l,{tmp_path}/r/raw", f"--out_dir={tmp_path}/c")
    compared = json.loads((tmp_path / "c/compare.json").read_text())
    assert len(compared["runs"]) == 2
    assert 0 < compared["pairs"][0]["p"] <= 1
    assert "| latent | 12 | 2 |" in done.stdout
    assert "p = " in done.stdout
    inside(eval_math, *flags, "--limit=5", f"--model={models}/raw", "--mode=raw", f"--out_dir={tmp_path}/few")
    assert (
        "asked other problems"
        in inside(
            eval_math, f"--compare={tmp_path}/l,{tmp_path}/few", f"--out_dir={tmp_path}/c2", code=1
        ).stderr
    )


def run_killed(flags: list[str], over) -> bool:
    """Start eval_math.py and kill it when over() says so; False if it ended before."""
    command = [sys.executable, str(ROOT / "eval_math.py"), *flags]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, **quiet, start_new_session=True)
    while child.poll() is None:
        if over():
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return True
        time.sleep(0.005)
    return False


def resumable_flags(sums, models) -> list[str]:
    flags = [f"--benchmark={sums}/test.jsonl", f"--shots={sums}/train.jsonl", "--n_shots=2"]
    return [*flags, "--max_new=48", "--k=2", "--block=1", f"--model={models}/latent"]


def assert_same_results(a, b) -> None:
    for name in ("results.json", "responses.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert not list(a.glob("*partial*")) and not list(a.glob("*.tmp"))


def cut_last_line(path) -> None:
    """As if the kill had come in the middle of a line."""
    if path.exists():
        path.write_bytes(path.read_bytes()[:-7])


def test_killed_and_resumed_gives_the_same_files(sums, models, tmp_path):
    """Killed behind the third problem, with half a fourth line; then by hand behind the last one."""
    flags = resumable_flags(sums, models)
    cut, partial = tmp_path / "cut", tmp_path / "cut/responses.partial.jsonl"

    def three_lines():
        return partial.exists() and partial.read_bytes().count(b"\n") >= 3

    inside(eval_math, *flags, f"--out_dir={tmp_path}/whole")
    assert run_killed([*flags, f"--out_dir={cut}"], three_lines)
    cut_last_line(partial)
    inside(eval_math, *flags, f"--out_dir={cut}")
    assert_same_results(cut, tmp_path / "whole")
    (cut / "results.json").unlink()
    (cut / "responses.jsonl").rename(partial)
    inside(eval_math, *flags, f"--out_dir={cut}")
    assert_same_results(cut, tmp_path / "whole")


@pytest.mark.long
def test_killed_ten_times_gives_the_same_files(sums, models, tmp_path):
    """At random moments, while it imports, loads, samples and writes."""
    flags = resumable_flags(sums, models)
    begin = time.time()
    script("eval_math.py", *flags, f"--out_dir={tmp_path}/whole")
    whole = time.time() - begin
    rng = np.random.default_rng(0)
    kills = 0
    while kills < 10:
        end = time.time() + float(rng.uniform(0.5, 1.0)) * whole
        if not run_killed([*flags, f"--out_dir={tmp_path}/cut"], lambda end=end: time.time() > end):
            shutil.rmtree(tmp_path / "cut")  # it was done: begin anew
            continue
        kills += 1
        if kills % 3 == 0:
            cut_last_line(tmp_path / "cut/responses.partial.jsonl")
    script("eval_math.py", *flags, f"--out_dir={tmp_path}/cut")
    assert_same_results(tmp_path / "cut", tmp_path / "whole")


def tuning_flags(sums, models, mode: str, n_seeds: int) -> list[str]:
    flags = [f"--benchmark={sums}/test.jsonl", f"--train_file={sums}/train.jsonl", "--finetune"]
    flags += [f"--mode={mode}", f"--model={models}/{mode}", f"--seeds={n_seeds}", "--epochs=2"]
    return [*flags, "--k=2", "--max_new=40", "--train=--lr=1e-3 --batch_size=8"]


@pytest.mark.parametrize("mode", ["raw", "latent"])
def test_training_problems_as_a_corpus(sums, models, mode, tmp_path):
    """The solution is the answer's thought, or in raw mode its beginning."""
    values = {"benchmark": f"{sums}/test.jsonl", "train_file": f"{sums}/train.jsonl"}
    s = settings(**values, mode=mode, model=f"{models}/{mode}", epochs=2)
    items = training_problems(s)
    flags = training_flags(s, items, tmp_path)
    corpus = open_corpus(tmp_path / "corpus")
    thoughts = open_thoughts(tmp_path / "thoughts", corpus)
    assert len(items) == corpus.n_docs == 28
    assert corpus.questions.tolist() == [True, False] * 28
    answer = corpus.tokenizer.decode(corpus.chunk(1))
    thought = corpus.tokenizer.decode(thoughts.span(1))
    assert items[0].solution in (answer if mode == "raw" else thought)
    assert len(thoughts.span(1)) == 0 or mode == "latent"
    sizes = np.diff(corpus.chunks[corpus.docs]) + np.diff(thoughts.chunks[corpus.docs])
    assert (flags["batch_size"], flags["max_steps"], flags["seq_len"]) == (28, 2, sizes.max() + 8)
    assert training_flags(s, items, tmp_path) == flags


def assert_tuned(folder, mode: str, n_seeds: int) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert len(results["mean of k samples"]["seeds"]) == n_seeds
    assert results["n"] == 12
    assert (results["greedy"]["sd"] is None) == (n_seeds == 1)
    training = json.loads((folder / "seed0/model/settings.json").read_text())
    assert training["loss"] == "completion"
    assert training["seed"] == 0
    assert training["lr"] == 1e-3
    corpus = open_corpus(folder / "data/corpus")
    assert corpus.n_docs == 28
    assert corpus.questions.tolist() == [True, False] * 28
    solution_in_text = "->" in corpus.tokenizer.decode(corpus.chunk(1))
    assert solution_in_text == (mode == "raw")


def test_fine_tuning_learns_the_completion_and_is_evaluated(sums, models, tmp_path, capfd):
    """Figures of each seed, mean and spread; the same command again is complete."""
    flags = [*tuning_flags(sums, models, "latent", 2), f"--out_dir={tmp_path}/latent"]
    inside(eval_math, *flags)
    assert_tuned(tmp_path / "latent", "latent", 2)
    evaluated = json.loads((tmp_path / "latent/seed1/eval/results.json").read_text())
    assert evaluated["n_shots"] == 0 and evaluated["sampled"]["k"] == 2
    capfd.readouterr()
    evaluated = inside(eval_math, *flags).stdout
    trained = capfd.readouterr().out  # of train.py, two processes of their own
    assert evaluated.count("complete") == trained.count("complete") == 2


@pytest.mark.slow
def test_fine_tuning_of_a_raw_model(sums, models, tmp_path):
    inside(eval_math, *tuning_flags(sums, models, "raw", 1), f"--out_dir={tmp_path}/raw")
    assert_tuned(tmp_path / "raw", "raw", 1)


@pytest.mark.parametrize(
    "flags,said",
    [
        ([], "give one of --benchmark"),
        (["--benchmark=gsm8k", "--corpus=c"], "give one of"),
        (["--benchmark=gsm8k"], "--model=... is required"),
        (["--benchmark=gsm8k", "--model=m", "--mode=raw", "--max_thought=5"], "--max_thought=5"),
        (["--corpus=c", "--model=m", "--finetune"], "--finetune: needs --benchmark"),
        (["--benchmark=gsm8k", "--model=m", "--shotz=3"], "--shots"),
        (["--compare=/nowhere"], "/nowhere"),
        (["--benchmark=gsm8k", f"--file={ROOT}/data/shots/gsm8k.jsonl", "--model=/nowhere"], "/nowhere"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, said, tmp_path):
    stderr = inside(eval_math, *flags, f"--out_dir={tmp_path}/e", code=1).stderr
    assert said in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert "Traceback" not in stderr


def test_a_wrong_flag_at_the_command_line(tmp_path):
    done = script("eval_math.py", "--benchmark=gsm8k", f"--out_dir={tmp_path}/e", code=1)
    [line] = done.stderr.strip().splitlines()
    assert "--model=... is required" in line


def test_a_corpus_without_questions_has_a_likelihood_only(models, tmp_path):
    """As data/text.py makes them: any chunk can carry a thought, nothing is asked. --compare works."""
    tok = load_tokenizer(models / "raw")
    documents = [
        [("Start at 3.", False), (" Add 4.", False), (f" The last digit is {n}.", False)] for n in range(8)
    ]
    write_corpus(tmp_path / "plain", documents, tok, {})
    flags = [f"--corpus={tmp_path}/plain", "--max_new=12", "--k=1"]
    done = inside(eval_math, *flags, f"--model={models}/raw", "--mode=raw", f"--out_dir={tmp_path}/r")
    assert "no question with an answer" in done.stdout
    inside(eval_math, *flags, f"--model={models}/latent", f"--out_dir={tmp_path}/l", "--samples=2")
    latent, raw = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("l", "r"))
    assert not {"accuracy", "n", "sampled"} & (latent.keys() | raw.keys())
    assert not (tmp_path / "l/responses.jsonl").exists()
    assert raw["bound_chunks"] == latent["bound_chunks"] == 24
    assert raw["nll_questions"] is latent["nll_questions"] is None
    assert raw["nll"] > 0
    assert latent["nll_bound"].keys() == {"1", "4", "16"}
    assert latent["nll_thoughtless"] > 0
    done = inside(eval_math, f"--compare={tmp_path}/r,{tmp_path}/l", f"--out_dir={tmp_path}/c")
    assert "| r NLL |" in done.stdout and "l IWAE-16 - r NLL: " in done.stdout
    write_corpus(tmp_path / "other", documents[:4], tok, {})
    inside(
        eval_math,
        f"--corpus={tmp_path}/other",
        *flags[1:],
        f"--model={models}/raw",
        "--mode=raw",
        f"--out_dir={tmp_path}/o",
    )
    done = inside(eval_math, f"--compare={tmp_path}/r,{tmp_path}/o", f"--out_dir={tmp_path}/c2", code=1)
    assert "measured on another corpus" in done.stderr
    (tmp_path / "o/likelihood.npz").write_bytes((tmp_path / "r/likelihood.npz").read_bytes()[:300])
    done = inside(eval_math, f"--compare={tmp_path}/r,{tmp_path}/o", f"--out_dir={tmp_path}/c2", code=1)
    assert "o/likelihood.npz: damaged" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.long
def test_smollm2_answers_gsm8k_as_transformers_does():
    """tests/bench_eval.py with 12 problems: token-identical greedy responses, the same score."""
    if not SHARED.exists():
        pytest.skip("needs ../shared/data/gsm8k and ../shared/tools")
    model = os.environ.get("SMOLLM2_MARKED", "/tmp/smolmark")
    if not os.path.exists(model):
        pytest.skip(
            f"{model}: make it by ../shared/tools/smollm2_hf.py and "
            f"train.py --init_from=... --max_steps=0 --out_dir={model}"
        )
    done = script(
        "tests/bench_eval.py",
        f"--model={model}",
        f"--file={SHARED}/data/gsm8k/test.jsonl",
        "--problems=12",
        "--max_new=64",
        timeout=1800,
    )
    assert "token-identical: 12 of 12" in done.stdout


def test_gain_by_evidence_asks_each_group_of_an_e_step():
    """Of two groups of two thoughts each one E-step: only where their own mean weight is above log_none is
    anything picked, though every thought makes its text likelier."""
    log_w = np.array([[-1.0, -1.0, -4.0, -4.0], [-9.0, -9.0, -9.0, -1.0]])
    got = SimpleNamespace(log_w=log_w, gain=np.ones((2, 4)), log_none=np.array([-2.0, -5.0]))
    got.pick, got.finished = np.zeros(2, dtype=int), np.ones((2, 4), dtype=bool)
    shares = {}
    for rule in ("text", "evidence"):
        s = eval_math.Settings(out_dir="", samples=2, gain_by=rule)
        shares[rule] = eval_math.e_step_figures(got, s, np.arange(2), None)["no_pick_share"]
    assert shares == {"text": 0.0, "evidence": 0.5}
