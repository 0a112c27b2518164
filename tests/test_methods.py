"""The comparison of methods: what its folders hold, that the teacher reads nothing but texts,
and the runs of em.py --compare.
"""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import inside, script

import em
from data import methods
from data.digits import OPERATIONS, Settings, make_documents, write_thought
from data.lib.cli import UserError
from data.lib.corpus import open_corpus, open_thoughts

TOKENS = 20_000
TINY = [
    "--compare",
    f"--tokens={TOKENS}",
    "--seeds=1",
    "--max_new=40",
    "--train=--batch_size=16 --n_layer=1 --n_embd=32",
    "--eval=--bound_docs=5",
]


def texts(folder) -> list[str]:
    corpus = open_corpus(folder)
    return [
        "".join(corpus.tokenizer.decode(corpus.chunk(i)) for i in range(a, b))
        for a, b in zip(corpus.docs, corpus.docs[1:])
    ]


@pytest.fixture(scope="module")
def made(digits, tmp_path_factory):
    """The folders, made from a corpus without its true thoughts."""
    folder = tmp_path_factory.mktemp("methods")
    for part in ("raw", "heldout"):
        shutil.copytree(digits / part, folder / "corpus" / part)
    script("data/methods.py", f"--corpus={folder}/corpus", f"--out_dir={folder}/m", f"--tokens={TOKENS}")
    return folder / "m"


def test_the_teacher_finds_the_true_thoughts_without_seeing_them(made, digits):
    ours, truth = open_corpus(made / "raw"), open_corpus(digits / "raw")
    found, true = open_thoughts(made / "latent_thoughts", ours), open_thoughts(digits / "raw_truth", truth)
    assert texts(made / "raw") == texts(digits / "raw") and texts(made / "heldout") == texts(
        digits / "heldout"
    )
    for i in range(ours.n_chunks):
        assert ours.tokenizer.decode(found.span(i)) == truth.tokenizer.decode(true.span(i))


def steps_in(text: str) -> list[tuple]:
    """The steps that a text writes out: "3 + 8 = 1." is ("3", "+", "8", "1")."""
    return re.findall(r" (\d+) ([-+*]) (\d+) = (\d+)\.", text)


def steps_of(thought: str) -> list[tuple]:
    """The same of a chain: each step begins where the one before has led."""
    words = thought.replace("->", "").split()
    return [tuple(words[i : i + 4]) for i in range(0, len(words) - 1, 3)]


@pytest.mark.parametrize("modulus", [10, 13])
def test_paraphrases_keep_the_problem_and_its_answer(modulus):
    """Numbers in their order and the answer at the end, whatever the style; steps only where
    they are wanted, and right.
    """
    s = Settings(out_dir="", operations="+-*", modulus=modulus, warm=1, raw=100, heldout=1)
    for [(question, thought, answer)] in make_documents(s)["raw"]:
        p = methods.understand(question + answer)
        assert write_thought(p.steps) == thought
        for style in methods.STYLES:
            plain, worked = (methods.rewrite(p, style, with_steps) for with_steps in (False, True))
            asked = re.findall(r"\d+", answer)
            for text in (plain, re.sub(r" \d+ [-+*] \d+ = \d+\.", "", worked)):
                assert sorted(re.findall(r"\d+", text)) == sorted(
                    re.findall(r"\d+", question) + asked
                ) and text.endswith(f" {p.result}.")
                assert re.findall(r"\d+", text)[: 1 + len(p.operations)] == re.findall(r"\d+", question)
            assert "=" not in plain and steps_in(worked) == steps_of(thought)
        assert methods.rewrite(p, "questions", True).startswith(question + " What is the")


def test_sizes_and_passes(made):
    listed = {m["name"]: m for m in json.loads((made / "meta.json").read_text())["methods"]}
    assert list(listed) == ["raw-repeat", "raw-fresh", "wrap", "wrap-cot", "latent"]
    assert (
        listed["wrap"]["documents"]
        == listed["wrap-cot"]["documents"]
        == 4 * listed["raw-repeat"]["documents"]
        == 240
    )
    assert TOKENS * 1.02 <= listed["raw-fresh"]["tokens"] < TOKENS * 1.02 + 100
    assert (
        len(
            {
                open_corpus(made / name).meta["tokenizer"]
                for name in ("raw", "wrap", "wrap_cot", "raw_fresh", "heldout")
            }
        )
        == 1
    )
    for name in ("raw", "wrap", "wrap_cot"):
        corpus, method = open_corpus(made / name), next(m for m in listed.values() if m["corpus"] == name)
        assert method["tokens"] == corpus.meta["n_tokens"] + 2 * corpus.n_docs
        assert method["evaluation"]["max_answer"] == np.diff(corpus.chunks[corpus.docs]).max()


def test_fresh_documents_are_new_and_solved(made):
    fresh, heldout, raw = (texts(made / name) for name in ("raw_fresh", "heldout", "raw"))
    assert len(set(fresh)) == len(fresh) and not set(fresh) & set(heldout + raw)
    for text in fresh:
        methods.understand(text)  # UserError for a wrong answer


def test_no_paraphrase_gives_a_held_out_problem_away(made):
    def numbers(text):
        return re.findall(r"\d+", re.sub(r" \d+ [-+*] \d+ = \d+\.", "", text))

    words = {word: op for op, word in OPERATIONS.items()} | {
        "increased by": "+",
        "multiplied by": "*",
        "Augment by": "+",
        "Scale by": "*",
        "Put": "+",
        "Make it": "*",
    }
    found = re.compile("|".join(words))

    def key(text):
        return tuple(words[w] for w in found.findall(text)), tuple(numbers(text))

    heldout = {key(text) for text in texts(made / "heldout")}
    told = {key(text) for name in ("wrap", "wrap_cot") for text in texts(made / name)}
    assert told == {key(text) for text in texts(made / "raw")}, "no wording hides its problem from this test"
    assert len(heldout) == 30 and not heldout & told


def test_the_same_bytes_again(made, tmp_path):
    script(
        "data/methods.py", f"--corpus={made.parent}/corpus", f"--out_dir={tmp_path}/m", f"--tokens={TOKENS}"
    )
    files = [path.relative_to(made) for path in made.rglob("*") if path.is_file()]
    assert len(files) > 40 and all(
        (made / file).read_bytes() == (tmp_path / "m" / file).read_bytes() for file in files
    )


def test_other_corpora_are_refused(tmp_path):
    script(
        "data/digits.py", f"--out_dir={tmp_path}/d", "--warm=5", "--raw=20", "--heldout=10", "--problems=3"
    )
    done = script("data/methods.py", f"--corpus={tmp_path}/d", f"--out_dir={tmp_path}/m", code=1)
    assert "expected documents of one problem each" in done.stderr and done.stderr.count("\n") == 1


def test_no_model_has_to_guess_where_the_question_ends(made):
    """What raw models are given includes the words before the answer, or those that ask for
    it; the answers are the same.
    """
    plain, begun, asked = (open_corpus(made / name) for name in ("heldout", "heldout_begun", "heldout_asked"))
    for i in range(0, plain.n_chunks, 2):
        (q, a), (qb, ab), (qa, aa) = (
            [c.tokenizer.decode(c.chunk(j)) for j in (i, i + 1)] for c in (plain, begun, asked)
        )
        assert (
            qb == f"{q} The last digit is"
            and qb + ab == q + a
            and qa == f"{q} What is the last digit?"
            and aa == a
        )


@pytest.mark.parametrize("text, said", [
    (" Start at 3. Add 8. The last digit is 2.", "the steps lead to 1"),
    ("Start at 3. Divide by 8. The last digit is 2.", "not a problem of data/digits.py"),
])  # fmt: skip
def test_a_text_that_the_teacher_cannot_follow(text, said):
    with pytest.raises(UserError, match=said):
        methods.understand(text)


def test_no_fresh_problem_is_left(digits, tmp_path):
    script(
        "data/digits.py",
        f"--out_dir={tmp_path}/d",
        "--warm=1",
        "--raw=5",
        "--heldout=5",
        "--min_ops=1",
        "--max_ops=1",
    )
    done = script(
        "data/methods.py", f"--corpus={tmp_path}/d", f"--out_dir={tmp_path}/m", "--tokens=50000", code=1
    )
    assert "raw-fresh: " in done.stderr and "lower --tokens" in done.stderr and done.stderr.count("\n") == 1


def test_flags_that_would_do_nothing_are_refused(tmp_path):
    compared = ["--infer=--select=uniform", "--samples=8", "--iterations=1", "--controls"]
    compared += ["--benchmark=gsm8k", "--base=M", "--jobs=2"]
    for flags in (["--tokens=5"], *(["--compare", flag] for flag in compared)):
        done = inside(em, f"--out_dir={tmp_path / 'run'}", "--train=--none", *flags, code=1)
        assert (
            f"{flags[-1].split('=')[0]}: does nothing with" in done.stderr and not (tmp_path / "run").exists()
        )


@pytest.mark.long
def test_compare_side_by_side_and_again(digits, tmp_path):
    """Every method on the same number of tokens; the second run does nothing, another budget
    is refused; half a minute on two quiet cores.
    """
    flags = [f"--corpus={digits}", f"--out_dir={tmp_path}/run", *TINY]
    first = script("em.py", *flags)
    report = json.loads((tmp_path / "run/compare.json").read_text())
    assert [r["name"] for r in report["rows"]] == ["raw-repeat", "raw-fresh", "wrap", "wrap-cot", "latent"]
    for row in report["rows"]:
        assert row["train_tokens"] == pytest.approx([TOKENS], rel=0.06) and row["accuracies"] == [
            row["accuracy"]
        ]
        assert row["name"] in first.stdout and (row["passes"] < 1) == (row["name"] == "raw-fresh")
    assert (
        first.stdout.count("$ python") == 11 and (tmp_path / "run/compare.png").read_bytes()[:4] == b"\x89PNG"
    )
    again = script("em.py", *flags)
    assert (
        "$ python" not in again.stdout and json.loads((tmp_path / "run/compare.json").read_text()) == report
    )
    assert "--tokens=20000 became 30000" in script("em.py", *flags, "--tokens=30000", code=1).stderr


@pytest.mark.long
def test_the_comparison(tmp_path):
    """The default comparison, 11 minutes of CPU time: with steps, in thoughts or in the text,
    far above without.
    """
    script("em.py", "--compare", f"--out_dir={tmp_path}/run", timeout=3600)
    accuracy = {
        r["name"]: r["accuracy"] for r in json.loads((tmp_path / "run/compare.json").read_text())["rows"]
    }
    assert (
        min(accuracy["latent"], accuracy["wrap-cot"]) > 0.9
        and max(accuracy[name] for name in ("wrap", "raw-repeat", "raw-fresh")) < 0.4
    )
