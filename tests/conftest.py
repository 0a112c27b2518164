"""Shared pieces of the tests: a tiny trained model with a tiny vocabulary, and a tiny corpus on disk."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

# Two workers with two threads each crawl on two cores. Torch reads this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

import torch

import train
from data.lib.cli import run
from data.lib.corpus import Corpus
from data.lib.stream import Rows, Stream

# Two letters and six special tokens: every thought of a few tokens can be written down.
TOY = SimpleNamespace(n_vocab=8, bos=2, eos=3, sol=4, eol=5, pri=6, pos=7)
TOY.markers = frozenset({TOY.eol})  # the others may stand in thoughts, so that there are more of them
TOY.decode_bytes = staticmethod(lambda ids, first=True: bytes(ids.tolist()))  # a byte a token


def script(
    name: str, *flags: str, env: dict | None = None, code: int = 0, timeout: int = 900
) -> subprocess.CompletedProcess:
    """Run one of the scripts as a user would; the exit code must be `code`."""
    done = subprocess.run(
        [sys.executable, str(ROOT / name), *flags],
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        timeout=timeout,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def inside(module, *flags: str, code: int = 0) -> subprocess.CompletedProcess:
    """As script(), in this process: starting another costs up to a second. module: data.show, ..."""
    out, err, argv = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO(), sys.argv
    sys.argv, got = [module.__file__, *map(str, flags)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(module.main, module.Settings)
    except SystemExit as e:
        got = e.code if isinstance(e.code, int) else 1
        err.write(f"{e.code}\n")
    finally:
        sys.argv = argv
    out.flush()
    said = out.buffer.getvalue().decode()
    assert got == code, f"exit code {got}\n{said}\n{err.getvalue()}"
    return subprocess.CompletedProcess(flags, got, said, err.getvalue())


def corpus_of(documents: list[list[list[int]]], questions=None) -> Corpus:
    """A corpus in memory from lists of chunks of ids."""
    chunks = [chunk for document in documents for chunk in document]
    offsets = np.cumsum([0] + [len(c) for c in chunks])
    docs = np.cumsum([0] + [len(d) for d in documents])
    asked = np.zeros(len(chunks), dtype=bool) if questions is None else np.array(questions)
    corpus = Corpus(
        Path("memory"), {}, np.array([t for c in chunks for t in c], dtype=np.int64), offsets, docs, asked
    )
    corpus.tokenizer = TOY
    return corpus


@pytest.fixture(scope="session")
def toy_model() -> train.Llama:
    """A tiny model, trained for a second on thoughts of up to two letters.

    So thoughts that are cut off are rare, but not absent.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    documents, thoughts = [], []
    for _ in range(300):
        a, b, c = rng.integers(0, 2, 3).tolist()
        documents.append([[a, b], [b, a, c]])
        thoughts += [[], [[c], [a, c], [a, b, c]][rng.integers(3)]]
    spans = np.cumsum([0] + [len(z) for z in thoughts])
    carried = SimpleNamespace(
        tokens=np.concatenate(thoughts), chunks=spans, span=lambda i: np.array(thoughts[i])
    )
    s = train.Settings(
        n_layer=2,
        n_embd=16,
        n_head=2,
        n_kv_head=1,
        max_steps=100,
        batch_size=32,
        optimizer="adamw",
        lr=5e-3,
        seed=1,
    )
    model = train.start_model(s, train.make_config(s, TOY.n_vocab), None, None, "cpu")
    data = Stream([corpus_of(documents)], [carried], TOY, Rows(seq_len=64))
    optimizers = train.make_optimizers(model, s)
    for step in range(s.max_steps):
        first, n = step * s.batch_size, s.batch_size
        train.train_step(
            model,
            optimizers,
            data.micro_batches(first, n, 1, slice(None)),
            data.n_targets(first, n),
            s,
            "cpu",
        )
    return model.eval()


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A small digits corpus on disk."""
    folder = tmp_path_factory.mktemp("digits") / "data"
    script(
        "data/digits.py",
        f"--out_dir={folder}",
        "--warm=40",
        "--raw=60",
        "--heldout=30",
        "--min_ops=1",
        "--max_ops=3",
    )
    return folder
