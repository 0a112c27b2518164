"""The sampler against transformers' generate, and the E-step as a command: parts, kills, counts."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, corpus_of, script

import train
from data.corpus import POSTERIOR, Corpus, open_corpus, open_thoughts
from data.tokenizer import make_tokenizer
from infer_thoughts import Engine, Limits, context_of, infer, rank_in_group


def test_greedy_decoding_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tok = make_tokenizer()
    s = train.Settings(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, tie_embeddings=False, seed=3)
    model = train.start_model(s, train.make_config(s, tok.n_vocab), None, tok, "cpu").eval()
    train.save_model(tmp_path, model, tok)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, rng.integers(1, 40)) for _ in range(20)]
    ours = Engine(model, 6).generate(prompts, np.arange(20), 1, 24, {tok.eos}, 0, greedy=True)
    for prompt, [(ids, _, log_q)] in zip(prompts, ours):
        out = reference.generate(torch.tensor(prompt[None]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False, eos_token_id=tok.eos, pad_token_id=0,
                                 output_scores=True, return_dict_in_generate=True)  # fmt: skip
        assert ids.tolist() == out.sequences[0, len(prompt) :].tolist()
        scores = reference.compute_transition_scores(out.sequences, out.scores, normalize_logits=True).sum().item()
        assert log_q == pytest.approx(scores, abs=1e-3)


def test_shared_prefixes_score_like_whole_sequences(toy_model):
    rng = np.random.default_rng(0)
    prefixes = [rng.integers(0, 8, rng.integers(1, 12)) for _ in range(15)]
    tails = [[rng.integers(0, 8, rng.integers(0, 6)) for _ in range(1 + i % 4)] for i in range(15)]
    engine = Engine(toy_model)
    engine.SCORED = 40
    got = engine.score(prefixes, tails)
    for prefix, group, values in zip(prefixes, tails, got):
        for tail, value in zip(group, values):
            ids = torch.tensor([[*prefix, *tail]])
            log_p = torch.log_softmax(toy_model.logits(toy_model(ids))[0], -1)
            expected = sum(log_p[len(prefix) + j - 1, t].item() for j, t in enumerate(tail))
            assert len(value) == len(tail) and value.sum() == pytest.approx(expected, abs=1e-4)


def test_rank_in_group():
    assert rank_in_group(np.array([5, 7, 5, 5, 7])).tolist() == [0, 0, 1, 2, 1]


def test_context_is_shortened_to_what_fits():
    corpus = corpus_of([[[0] * 10, [0] * 10, [0] * 10, [1] * 4, [1] * 4]])
    assert context_of(corpus, 4, Limits(3, 8, 100)) == [1, 2, 3]
    assert context_of(corpus, 4, Limits(3, 8, 34)) == [2, 3]
    assert context_of(corpus, 4, Limits(3, 8, 20)) == []


def test_chunks_of_other_documents_are_never_context(toy_model):
    together = corpus_of([[[0, 1]], [[1, 1]]])
    alone = corpus_of([[[1, 1]]])
    assert context_of(together, 1, Limits(3, 4, 64)) == []
    a = infer(Engine(toy_model), TOY, together, np.array([1]), 8, Limits(3, 4, 64), 0)
    b = infer(
        Engine(toy_model),
        TOY,
        Corpus(alone.folder, {}, together.tokens, together.chunks, together.docs, together.questions),
        np.array([1]),
        8,
        Limits(3, 4, 64),
        0,
    )
    np.testing.assert_array_equal(a.log_w, b.log_w)


# --------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "M0"
    script("train.py", f"--corpus={digits}/warm", f"--thoughts={digits}/warm_thoughts", f"--out_dir={out}", "--max_steps=60", "--batch_size=16")
    return out


def run_infer(digits, model, out, *flags):
    return [f"--corpus={digits}/raw", f"--model={model}", f"--out_dir={out}", "--max_new=24", "--part_size=7", *flags]


def test_thoughts_folder(digits, model, tmp_path):
    out = script("infer_thoughts.py", *run_infer(digits, model, tmp_path / "E", "--show=2")).stdout
    corpus = open_corpus(digits / "raw")
    thoughts, samples = open_thoughts(tmp_path / "E", corpus), np.load(tmp_path / "E/samples.npz")
    meta = json.loads((tmp_path / "E/meta.json").read_text())
    asked = ~corpus.questions
    assert meta["n_inferred"] == 60 and meta["n_questions"] == 60 and samples["log_w"].shape == (120, 4)
    done = samples["finished"] & asked[:, None]
    np.testing.assert_allclose(samples["log_w"][done], samples["log_p"][done] - samples["log_q"][done])
    assert (samples["log_w"][asked][~samples["finished"][asked]] == -np.inf).all()
    assert meta["cut_off"] == (~samples["finished"][asked]).sum() and meta["cut_off_share"] == meta["cut_off"] / 240
    for i in range(corpus.n_chunks):
        picked = samples["pick"][i]
        assert (picked == -1) == (corpus.questions[i] or not samples["finished"][i].any())
        assert len(thoughts.span(i)) == (samples["length"][i, picked] - 1 if picked >= 0 else 0)
        assert picked == -1 or samples["finished"][i, picked], "a cut-off thought is never picked"
    assert out.count("->") == 2 and out.count("log_w") == 8 and 1 <= meta["ess"] <= 4
    assert not (tmp_path / "E.parts").exists() and not list(tmp_path.glob("*.tmp"))


def test_all_cut_off_gives_no_thought(digits, model, tmp_path):
    out = script("infer_thoughts.py", *run_infer(digits, model, tmp_path / "E"), "--max_new=2").stdout
    meta = json.loads((tmp_path / "E/meta.json").read_text())
    thoughts = open_thoughts(tmp_path / "E", open_corpus(digits / "raw"))
    assert meta["all_cut_off"] > 50 and f"all cut off {meta['all_cut_off']}" in out
    assert (np.diff(thoughts.chunks) > 0).sum() + meta["empty_picks"] == 60 - meta["all_cut_off"]


def test_parts_and_rows_change_nothing(digits, model, tmp_path):
    script("infer_thoughts.py", *run_infer(digits, model, tmp_path / "a"))
    script("infer_thoughts.py", *run_infer(digits, model, tmp_path / "b"), "--part_size=1000", "--rows=9")
    assert (tmp_path / "a/tokens.bin").read_bytes() == (tmp_path / "b/tokens.bin").read_bytes()
    a, b = np.load(tmp_path / "a/samples.npz"), np.load(tmp_path / "b/samples.npz")
    np.testing.assert_allclose(a["log_w"], b["log_w"], atol=1e-3)
    assert (a["length"] == b["length"]).all()


def test_killed_runs_go_on(digits, model, tmp_path):
    script("infer_thoughts.py", *run_infer(digits, model, tmp_path / "whole"))
    command = [sys.executable, str(ROOT / "infer_thoughts.py"), *run_infer(digits, model, tmp_path / "killed")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "killed.parts").glob("*.npz"))) < 3 and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "killed").exists() and len(list((tmp_path / "killed.parts").glob("*.npz"))) >= 3
    script("infer_thoughts.py", *run_infer(digits, model, tmp_path / "killed"))
    for name in ("tokens.bin", "chunks.npy", "meta.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    a, b = np.load(tmp_path / "whole/samples.npz"), np.load(tmp_path / "killed/samples.npz")
    assert all(np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == "f") for k in a.files)
    assert "complete" in script("infer_thoughts.py", *run_infer(digits, model, tmp_path / "killed")).stdout
    assert "--seed=0 became 1" in script("infer_thoughts.py", *run_infer(digits, model, tmp_path / "killed"), "--seed=1", code=1).stderr


def test_other_tokenizer_and_nothing_to_infer(digits, model, tmp_path):
    script("data/digits.py", f"--out_dir={tmp_path}/other", "--warm=5", "--raw=5", "--heldout=5", "--n_vocab=256")
    flags = [f"--corpus={tmp_path}/other/raw", f"--model={model}", f"--out_dir={tmp_path}/E"]
    assert "another tokenizer" in script("infer_thoughts.py", *flags, code=1).stderr
    done = script("infer_thoughts.py", *run_infer(digits, model, tmp_path / "E"), "--max_new=5000", code=1)
    assert "no chunk to infer" in done.stderr and "'n_too_long': 60" in done.stderr and not (tmp_path / "E").exists()
    assert POSTERIOR == 2
