"""Tokenizers, folders on disk, sequences, and the two makers."""

import importlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SHARED, TOY, inside, script

from data import digits as digits_maker
from data import gsm8k
from data.digits import Settings as DigitsSettings
from data.digits import make_documents, pairs_of, solve, true_nats, write_thought
from data.gsm8k import read_problem
from data.lib.cli import UserError, claim, read_json, write_json
from data.lib.corpus import (
    POSTERIOR,
    PRIOR,
    RAW,
    hash_uniform,
    layout,
    open_corpus,
    open_thoughts,
    write_corpus,
    write_thoughts,
)
from data.lib.tokenizer import MARKERS, load_tokenizer, make_tokenizer

TEXTS = [
    "Start at 3. Add 8.",
    "The café's naïve 数学 🎉 costs 1,234.50!",
    "a\n\n\tb  \r\n  c ",
    "<|END_OF_LATENT|> is text here",
    "",
    "x" * 300,
]
SCRAPS = "".join(TEXTS) + "éß\u0301\u200b\ud7ff\U0001f600"


def random_texts(n: int) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list(SCRAPS), rng.integers(1, 40))) for _ in range(n)]


# ---------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("n_vocab", [256, 400])
def test_tokenizer_gives_text_back(n_vocab):
    tok = make_tokenizer(TEXTS * 3, n_vocab)
    for text in TEXTS + random_texts(300):
        ids = tok.encode(text)
        assert tok.decode(ids) == text and tok.decode_bytes(ids) == text.encode()
        assert not set(ids) & {tok.bos, tok.eos, tok.sol, tok.eol, tok.pri, tok.pos}, (
            "text never turns into special tokens"
        )


def test_plain_bytes():
    tok = make_tokenizer()
    assert tok.encode("hé") == list("hé".encode()) and tok.n_vocab == 262


@pytest.mark.parametrize("n_vocab", [256, 400])
def test_ids_equal_the_tokenizers_library(n_vocab, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tok = make_tokenizer(TEXTS * 3, n_vocab)
    tok.save(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS[:3] + TEXTS[4:] + random_texts(500):
        assert tok.encode(text) == reference.encode(text, add_special_tokens=False).ids
    for name in (*MARKERS, "<|BOS|>", "<|EOS|>"):
        assert tok.special[name] == reference.token_to_id(name)


def test_reads_what_the_tokenizers_library_trains(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(
        [TEXTS * 5], vocab_size=320, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    ours = load_tokenizer(tmp_path)
    for text in TEXTS[:3] + random_texts(300):
        assert ours.encode(text) == theirs.encode(text).ids
    assert (
        len({ours.eos, ours.sol, ours.eol, ours.pri, ours.pos}) == 5
        and ours.n_vocab == theirs.get_vocab_size() + 4
    )


def test_save_and_load_is_the_same_tokenizer(tmp_path):
    tok = make_tokenizer(TEXTS, 300)
    tok.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (
        again.sha256 == tok.sha256
        and again.encode(TEXTS[1]) == tok.encode(TEXTS[1])
        and again.n_vocab == tok.n_vocab
    )


def test_tokenizers_that_cannot_be_represented_are_refused(tmp_path):
    make_tokenizer(TEXTS, 300).save(tmp_path)
    spec = read_json(tmp_path / "tokenizer.json")
    for change in (
        {"normalizer": {"type": "NFD"}},
        {"model": spec["model"] | {"type": "Unigram"}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"model": 3},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec | change))
        with pytest.raises(UserError, match="tokenizer.json"):
            load_tokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------- sequences


def test_layout_in_full():
    t, x, y, z = TOY, [0, 1], [1], [0, 0, 1]
    ids, parts = layout(t, [x, y, x], [[], z, z], [RAW, PRIOR, POSTERIOR])
    expected = [t.bos, *x, t.sol, t.pri, *z, t.eol, *y, t.sol, t.eol, *x, t.sol, t.pos, *z, t.eol, t.eos]
    assert ids.tolist() == expected
    for part, chunk, thought in zip(parts, [x, y, x], [[], [*z, t.eol], [*z, t.eol]]):
        assert ids[slice(*part.chunk)].tolist() == chunk and ids[slice(*part.thought)].tolist() == thought


def test_layout_of_prompts_is_a_prefix_of_the_whole():
    for form in (PRIOR, POSTERIOR):
        prompt, _ = layout(TOY, [[0], [1, 1]], [[], None], [RAW, form])
        whole, parts = layout(TOY, [[0], [1, 1]], [[], [0]], [RAW, form])
        assert prompt.tolist() == whole[: len(prompt)].tolist() and parts[1].thought[0] == len(prompt)
    empty, parts = layout(TOY, [[1]], [[]], [PRIOR], end=False)  # an empty thought is a thought: EOL at once
    assert empty.tolist() == [TOY.bos, TOY.sol, TOY.pri, TOY.eol, 1] and parts[0].thought == (3, 4)


def test_hash_uniform_is_uniform_and_keyed():
    u = hash_uniform(1, 0, np.arange(100000), 2)
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert (np.histogram(u, 20, (0, 1))[0] > 4700).all()
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01
    assert (
        hash_uniform(1, 0, 5, 2)[0] == u[5]
        and hash_uniform(1, 0, 2, 5)[0] != u[5]
        and hash_uniform(2, 0, 5, 2)[0] != u[5]
    )
    assert hash_uniform(1, -1, 5)[0] != hash_uniform(1, 1, 5)[0]


# ------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    tok = make_tokenizer(TEXTS, 300)
    documents = [[("What is it?", True), (" A café.", False)], [("Plain 数学.", False)]]
    write_corpus(tmp_path / "corpus", documents, tok, {})
    corpus = open_corpus(tmp_path / "corpus")
    write_thoughts(tmp_path / "thoughts", corpus, [[], tok.encode("Think."), []], {})
    return tmp_path


def test_corpus_round_trip(folder):
    corpus = open_corpus(folder / "corpus")
    tok, thoughts = corpus.tokenizer, open_thoughts(folder / "thoughts", corpus)
    assert [tok.decode(corpus.chunk(i)) for i in range(3)] == ["What is it?", " A café.", "Plain 数学."]
    assert corpus.questions.tolist() == [True, False, False] and (corpus.n_docs, corpus.n_chunks) == (2, 3)
    assert [list(corpus.before(i, 3)) for i in range(3)] == [[], [0], []] and corpus.doc_of(
        np.arange(3)
    ).tolist() == [0, 0, 1]
    assert [tok.decode(thoughts.span(i)) for i in range(3)] == ["", "Think.", ""]
    assert not list(folder.glob("**/*.tmp")) and corpus.tokens.dtype == np.uint16


def truncate(path, n=3):
    path.write_bytes(path.read_bytes()[:-n])


DAMAGES = {
    "tokens cut off by a byte": lambda f: truncate(f / "corpus/tokens.bin"),
    "tokens cut off by a token": lambda f: truncate(f / "corpus/tokens.bin", 2),
    "offsets cut off": lambda f: truncate(f / "corpus/chunks.npy"),
    "offsets empty": lambda f: (f / "corpus/docs.npy").write_bytes(b""),
    "no tokens": lambda f: (f / "corpus/tokens.bin").unlink(),
    "no meta": lambda f: (f / "corpus/meta.json").unlink(),
    "meta is not JSON": lambda f: (f / "corpus/meta.json").write_text("{"),
    "meta of something else": lambda f: (f / "corpus/meta.json").write_text("{}"),
    "questions of another size": lambda f: np.save(f / "corpus/questions.npy", np.zeros(7, bool)),
    "falling offsets": lambda f: np.save(f / "corpus/chunks.npy", np.array([0, 9, 5, 13])),
    "thoughts cut off": lambda f: truncate(f / "thoughts/tokens.bin", 2),
    "no folder": lambda f: shutil.rmtree(f / "corpus"),
    "no thoughts": lambda f: shutil.rmtree(f / "thoughts"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_by_name(folder, damage):
    DAMAGES[damage](folder)
    with pytest.raises(UserError) as e:
        corpus = open_corpus(folder / "corpus")
        open_thoughts(folder / "thoughts", corpus)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


def test_other_tokenizers_and_other_corpora_are_refused(folder):
    with pytest.raises(UserError, match="another tokenizer"):
        open_corpus(folder / "corpus", make_tokenizer(["abc abc"], 257))
    write_corpus(folder / "other", [[("Other.", False)]], make_tokenizer(TEXTS, 300), {})
    with pytest.raises(UserError, match="another corpus"):
        open_thoughts(folder / "thoughts", open_corpus(folder / "other"))


def test_empty_documents_are_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(UserError, match="document 1 is empty"):
        write_corpus(tmp_path / "c", [[("a", False)], []], make_tokenizer(), {})
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- makers


def test_no_held_out_digits_problem_is_trained_on():
    for seed in range(3):
        documents = make_documents(DigitsSettings(out_dir="", seed=seed))
        questions = {part: {q for d in docs for q, _, _ in d} for part, docs in documents.items()}
        assert (
            not questions["heldout"] & (questions["warm"] | questions["raw"])
            and not questions["warm"] & questions["raw"]
        )
        assert [len(questions[p]) for p in ("warm", "raw", "heldout")] == [100, 600, 1000]
    assert documents != make_documents(DigitsSettings(out_dir="", seed=0))


def test_digits_arithmetic():
    steps, result = solve((3, (("+", 8), ("*", 9))), 10)
    assert (
        steps == [(3, "+", 8, 1), (1, "*", 9, 9)]
        and result == 9
        and write_thought(steps) == " 3 + 8 -> 1 * 9 -> 9"
    )
    steps, result = solve((2, (("-", 8), ("*", 12))), 13)
    assert result == 6 and write_thought(steps) == " 2 - 8 -> 7 * 12 -> 6"
    s = DigitsSettings(
        out_dir="", warm=5, raw=5, heldout=5, problems=3, modulus=13, min_ops=1, max_ops=2, operations="-"
    )
    for document in sum(make_documents(s).values(), []):
        assert len(document) == 3
        for question, thought, answer in document:
            assert (
                thought.split()[-1] == answer.split()[-1].rstrip(".")
                and question.count("Subtract") == thought.count(" - ")
                and "by 13" in answer
            )


def test_factors_keep_a_mistake_visible():
    """No factor makes more than two numbers alike: at most two values become one by a product."""
    for modulus, left_out in ((10, {0, 5}), (13, {0}), (12, {0, 3, 4, 6, 8, 9})):
        pairs = pairs_of(DigitsSettings(out_dir="", operations="+-*", modulus=modulus))
        assert {n for n in range(modulus)} - {n for op, n in pairs if op == "*"} == left_out
        assert sum(op == "+" for op, _ in pairs) == sum(op == "-" for op, _ in pairs) == modulus
        for op, n in pairs:
            products = [v * n % modulus for v in range(modulus)]
            assert op != "*" or max(map(products.count, products)) <= 2


def test_true_nats_are_the_uncertainty_of_a_question_being_over(digits):
    """With 1 to 3 operations, after one of them one of three lengths ends; after two, one of two."""
    corpus = open_corpus(digits / "heldout")
    for document, nats in enumerate(true_nats(corpus)):
        question = corpus.tokenizer.decode(corpus.chunk(2 * document))
        n = question.count("Add") + question.count("Multiply")
        assert nats == pytest.approx({1: np.log(3), 2: np.log(2), 3: 0.0}[n])


def test_digits_folders(digits, tmp_path):
    inside(
        digits_maker,
        f"--out_dir={tmp_path}",
        "--warm=40",
        "--raw=60",
        "--heldout=30",
        "--min_ops=1",
        "--max_ops=3",
    )
    for path in digits.glob("*/*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(digits)).read_bytes(), (
            "the same seed gives the same bytes"
        )
    raw = open_corpus(digits / "raw")
    text = raw.tokenizer.decode(raw.tokens)
    assert "->" not in text and text.count("The last digit") == 60
    warm = open_corpus(digits / "warm")
    thoughts = open_thoughts(digits / "warm_thoughts", warm)
    assert all((len(thoughts.span(i)) == 0) == warm.questions[i] for i in range(warm.n_chunks))


def test_multi_chunk_documents(tmp_path):
    inside(digits_maker, f"--out_dir={tmp_path}", "--warm=5", "--raw=5", "--heldout=5", "--problems=3")
    corpus = open_corpus(tmp_path / "raw")
    assert np.diff(corpus.docs).tolist() == [6] * 5 and list(corpus.before(5, 3)) == [2, 3, 4]
    assert corpus.tokenizer.decode(corpus.chunk(2)).startswith("\nStart at")


def test_gsm8k_line():
    line = json.dumps(
        {
            "question": "How many?",
            "answer": "She has <<2+3=5>>5 eggs.\nShe sells <<5*1,000=5000>>5,000.\n#### 5,000",
        }
    )
    assert read_problem(line) == ("How many?", "She has 5 eggs.\nShe sells 5,000.", "5,000")
    for bad, reason in (
        ("{", "Expecting"),
        ("[]", "object"),
        ('{"question": "a"}', '"answer"'),
        ('{"question": " ", "answer": "#### 1"}', '"question"'),
        ('{"question": "a", "answer": "no mark"}', "####"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_problem(bad)


def test_gsm8k_folders(tmp_path):
    problems = [
        {"question": f"What is {i} + {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>secret{i}.\n#### {2 * i}"}
        for i in range(30)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, problems)))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, problems[25:])))
    flags = [f"--train={tmp_path}/train.jsonl", f"--test={tmp_path}/test.jsonl"]
    out = inside(gsm8k, *flags, f"--out_dir={tmp_path}/g", "--warm=10").stdout
    assert "5 problems are also test problems" in out
    warm, raw, held = (open_corpus(tmp_path / "g" / part) for part in ("warm", "raw", "heldout"))
    assert (warm.n_docs, raw.n_docs, held.n_docs) == (10, 15, 5)
    tok, thoughts = warm.tokenizer, open_thoughts(tmp_path / "g/warm_thoughts", warm)
    assert "secret" in tok.decode(thoughts.tokens) and "<<" not in tok.decode(thoughts.tokens)
    assert "secret" not in tok.decode(raw.tokens) + tok.decode(warm.tokens) and "answer is" in tok.decode(
        raw.tokens
    )
    assert not (tmp_path / "g/raw_truth").exists()
    few = inside(gsm8k, *flags, f"--out_dir={tmp_path}/few", "--warm=27", code=1).stderr
    assert "has 25 problems that are not tested; leave some" in few
    # Of more raw problems those count that are new: 28 is tested, 3 is there, 40 and 41 need no solution.
    # Quotes, case and white space make no new problem, another operator does.
    more = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in (28, 3, 40, 41)]
    alike = "WHAT IS  40 +40", "“What is 26 + 26?”", "What is 4 - 4?"
    more += [{"question": question, "answer": "#### 0"} for question in alike]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, more)))
    flags.append(f"--raw_more={tmp_path}/more.jsonl")
    inside(gsm8k, *flags, f"--out_dir={tmp_path}/all", "--warm=25", "--truth")
    raw, held = open_corpus(tmp_path / "all/raw"), open_corpus(tmp_path / "all/heldout")
    asked = [raw.text(i) for i in range(0, raw.n_chunks, 2)]
    assert asked == ["What is 40 + 40?", "What is 41 + 41?", "What is 4 - 4?"] and raw.n_docs == 3
    assert not len(open_thoughts(tmp_path / "all/raw_truth", raw).tokens)
    assert "secret25" in raw.tokenizer.decode(open_thoughts(tmp_path / "all/heldout_truth", held).tokens)
    bare = f"--train={tmp_path}/more.jsonl", flags[1], f"--out_dir={tmp_path}/bare", "--warm=2"
    assert "2 problems that would be warm have no solution" in inside(gsm8k, *bare, code=1).stderr
    few = inside(gsm8k, *flags, f"--out_dir={tmp_path}/few", "--warm=26", code=1).stderr
    assert "has 25 problems that are not tested; leave some" in few
    (tmp_path / "train.jsonl").write_text(
        '{"question": "a", "answer": "#### 1"}\nnonsense\n{"question": "b", "answer": "#### 1"}'
    )
    assert "train.jsonl:2: " in inside(gsm8k, *flags, f"--out_dir={tmp_path}/bad", "--warm=1", code=1).stderr


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent: no real GSM8K to read")
def test_real_gsm8k(tmp_path):
    files = [f"--{part}={SHARED}/data/gsm8k/{part}.jsonl" for part in ("train", "test")]
    inside(gsm8k, *files, f"--out_dir={tmp_path}", "--n_vocab=256")
    counts = [open_corpus(tmp_path / part).n_docs for part in ("warm", "raw", "heldout")]
    assert counts == [500, 6973, 1319]


# --------------------------------------------------------------------------------------------- command line

WRONG = [
    (["train.py", "--corpsu=x"], "did you mean --corpus?"),
    (["train.py", "--max_steps=many"], "whole number"),
    (["train.py", "--max_steps=-1"], "at least 0"),
    (["train.py", "--lr=nan"], "finite"),
    (["train.py", "--optimizer=sgd"], "muon, adamw"),
    (["train.py", "steps=3"], "--name=value"),
    (["train.py", "--max_steps"], "needs a value"),
    (["train.py", "--out_dir=x"], "--corpus=... is required"),
    (["train.py", "--corpus=no/where", "--out_dir=x"], "no/where: no such corpus folder"),
    (["train.py", "--preset=gpt5"], "toy, smollm2-135m"),
    (["train.py", "--init_from=no/where", "--max_steps=0", "--out_dir=x"], "no/where: no such model folder"),
    (["train.py", "--max_steps=0", "--out_dir=x"], "--corpus=... is required"),
    (["train.py", "--plan=here"], "--n_vocab"),
    (
        ["infer_thoughts.py", "--corpus=c", "--model=no/model", "--out_dir=x"],
        "no/model: no such model folder",
    ),
    (["eval_math.py", "--corpus=c", "--model=m", "--out_dir=x", "--mode=fast"], "latent, raw"),
    (["data/digits.py", "--out_dir=x", "--min_ops=1", "--max_ops=1"], "exist"),
    (["data/digits.py", "--out_dir=x", "--operations=/"], "--operations"),
    (["data/gsm8k.py", "--train=no.jsonl", "--test=no.jsonl", "--out_dir=x"], "no.jsonl: no such file"),
    (["em.py", "--preset=word-problems", "--base=x"], "--preset=word-problems: needs --corpus and --base"),
    (["em.py", "--only=gold"], "--only: says which rows; add --controls"),
    (["em.py", "--controls", "--only=golds"], "--only=golds: expected raw_tokens, raw_flops, warm_flops"),
    (["em.py", "--corpus=no/where", "--out_dir={tmp}/em"], "no/where/warm: missing"),
    (["em.py", "--iteration=3"], "did you mean --iterations?"),
]


# One command of each script runs as a user would start it, and the one that inside() has no presets for.
FIRST = {command[0]: command for command, _ in reversed(WRONG)}
OWN_PROCESS = [*FIRST.values(), ["train.py", "--preset=gpt5"]]


@pytest.mark.parametrize("command,message", WRONG, ids=[" ".join(c) for c, _ in WRONG])
def test_wrong_input_ends_in_one_line(command, message, tmp_path, monkeypatch):
    name, *flags = command
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    if command in OWN_PROCESS:
        done = script(name, *flags, code=1)
    else:
        monkeypatch.chdir(tmp_path)
        module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        done = inside(module, *flags, code=1)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name", ["train.py", "infer_thoughts.py", "eval_math.py", "em.py", "data/digits.py", "data/gsm8k.py"]
)
def test_help_names_every_setting(name):
    text = script(name, "--help").stdout
    source = (ROOT / name).read_text()
    settings = [
        line.split(":")[0].strip() for line in source.splitlines() if ": " in line and "= opt(" in line
    ]
    assert settings and all(f"--{s}=" in text for s in settings) and f"python {name}" in text


def test_a_lock_is_held_where_standard_input_is_closed(tmp_path):
    """Then the lock's file has the number 0, which must not be taken for "not held"."""
    code = "import os; os.close(0)\nfrom data.lib.cli import hold\n"
    code += f"with hold({str(tmp_path / 'lock')!r}, wait=False) as held: print(bool(held))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_a_folder_that_is_older_than_a_setting_is_still_its_own(tmp_path):
    """A setting that settings.json lacks counts as its default; another value is refused."""
    settings = DigitsSettings(out_dir=str(tmp_path), warm=7)
    claim(tmp_path, settings)
    older = read_json(tmp_path / "settings.json")
    assert older.pop("heldout") == DigitsSettings.heldout
    write_json(tmp_path / "settings.json", older)
    claim(tmp_path, settings)
    with pytest.raises(UserError, match=f"--heldout={DigitsSettings.heldout} became 1"):
        claim(tmp_path, DigitsSettings(out_dir=str(tmp_path), warm=7, heldout=1))
