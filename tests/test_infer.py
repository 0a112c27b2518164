"""The sampler against transformers' generate, and the E-step as a command: parts, kills, counts."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, corpus_of, inside, script

import data.digits
import infer_thoughts
import train
from data.lib import model_folder
from data.lib.cli import UserError
from data.lib.corpus import POSTERIOR, Corpus, open_corpus, open_thoughts, write_corpus
from data.lib.engine import Engine, Sampling
from data.lib.parts import Work, do_parts, split_parts
from data.lib.tokenizer import make_tokenizer
from infer_thoughts import EStep, Limits, context_of, infer, rank_in_group


def test_greedy_decoding_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tok = make_tokenizer()
    s = train.Settings(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, tie_embeddings=False, seed=3)
    model = train.start_model(s, train.make_config(s, tok.n_vocab), None, tok, "cpu").eval()
    model_folder.save_model(tmp_path, model, tok)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, rng.integers(1, 40)) for _ in range(20)]
    ours = Engine(model, 6).generate(
        prompts, np.arange(20), 1, Sampling(24, frozenset({tok.eos}), temperature=0.0)
    )
    for prompt, [(ids, _, log_q)] in zip(prompts, ours):
        out = reference.generate(
            torch.tensor(prompt[None]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=tok.eos,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        assert ids.tolist() == out.sequences[0, len(prompt) :].tolist()
        scores = (
            reference.compute_transition_scores(out.sequences, out.scores, normalize_logits=True).sum().item()
        )
        assert log_q == pytest.approx(scores, abs=1e-3)


def test_tails_score_like_whole_sequences(toy_model):
    rng = np.random.default_rng(0)
    prefixes = [rng.integers(0, 8, rng.integers(1, 12)) for _ in range(15)]
    tails = [[rng.integers(0, 8, rng.integers(0, 6)) for _ in range(1 + i % 4)] for i in range(15)]
    tails[3] = [tails[3][0], [1, 2, 3], tails[3][0], [1, 2, 3]]
    engine = Engine(toy_model)
    engine.SCORE_TOKENS = 40
    scored, score_batch = [], engine.score_batch
    engine.score_batch = lambda *args: scored.extend(args[1]) or score_batch(*args)
    got = engine.score(prefixes, tails)
    assert len(scored) == sum(len({tuple(tail) for tail in group} - {()}) for group in tails)
    for prefix, group, values in zip(prefixes, tails, got):
        for tail, value in zip(group, values):
            ids = torch.tensor([[*prefix, *tail]])
            log_p = torch.log_softmax(toy_model.logits(toy_model(ids))[0], -1)
            expected = sum(log_p[len(prefix) + j - 1, t].item() for j, t in enumerate(tail))
            assert len(value) == len(tail) and value.sum() == pytest.approx(expected, abs=1e-4)


def test_a_batch_of_scores_is_bounded_by_what_it_pads(toy_model):
    """A long context or tail among short ones: of R rows, R * T are computed and R * P read of the cache."""
    engine, batches = Engine(toy_model), []
    engine.SCORE_TOKENS = 256
    attend_rows = engine.attend_rows

    def recorded(starts, lengths, n_cached, slots):
        batches.append((len(lengths), int(lengths.max()), int(n_cached.max())))
        return attend_rows(starts, lengths, n_cached, slots)

    engine.attend_rows = recorded
    prompts = [np.arange(n) % 2 for n in (200, *range(4, 34))]

    def score(slots, drawn):
        tails = [[np.ones(n, np.int64) for n in (1, 3, 40 if i == 7 else 2)] for i in slots.values()]
        engine.score([prompts[i] for i in slots.values()], tails, list(slots))

    engine.generate(prompts, np.arange(31), 1, Sampling(2, frozenset()), on_ended=score)
    engine.score([p[:1] for p in prompts], [[p[1:]] for p in prompts])
    assert len(batches) > 2 and max(R for R, _, _ in batches) > 20, "most rows lie side by side"
    assert max(P for _, _, P in batches) == 199 and max(T for _, T, _ in batches) == 199
    assert all(R * T <= 256 and R * P <= 8 * 256 for R, T, P in batches)


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
    a = infer(Engine(toy_model), together, np.array([1]), EStep(Limits(3, 4, 64), 8))
    same = Corpus(alone.folder, {}, together.tokens, together.chunks, together.docs, together.questions)
    same.tokenizer = TOY
    b = infer(Engine(toy_model), same, np.array([1]), EStep(Limits(3, 4, 64), 8))
    np.testing.assert_array_equal(a.log_w, b.log_w)


# --------------------------------------------------------------------------------------------- the command


def train_on(digits, out, *flags) -> None:
    warm = [f"--corpus={digits}/warm", f"--thoughts={digits}/warm_thoughts"]
    inside(train, *warm, f"--out_dir={out}", *flags)


@pytest.fixture(scope="module")
def model(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "M0"
    train_on(digits, out, "--max_steps=60", "--batch_size=16")
    return out


def run_infer(digits, model, out, *flags):
    where = [f"--corpus={digits}/raw", f"--model={model}", f"--out_dir={out}"]
    return [*where, "--max_new=24", "--part_size=7", "--workers=1", *flags]


ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(digits, model, tmp_path_factory):
    """(folder, output) of a run in one go, in a process of its own with one thread."""
    out = tmp_path_factory.mktemp("whole") / "E"
    flags = run_infer(digits, model, out, "--show=9")
    return out, script("infer_thoughts.py", *flags, env=ONE_THREAD).stdout


@pytest.fixture(scope="module")
def every_pick(digits, model, tmp_path_factory):
    """The same without the rule of the gain."""
    out = tmp_path_factory.mktemp("every") / "E"
    flags = run_infer(digits, model, out, "--show=2", "--min_gain=-inf")
    return out, script("infer_thoughts.py", *flags, env=ONE_THREAD).stdout


def read_meta(folder) -> dict:
    return json.loads((folder / "meta.json").read_text())


def test_thoughts_folder(digits, every_pick):
    folder, out = every_pick
    corpus = open_corpus(digits / "raw")
    thoughts, samples = open_thoughts(folder, corpus), np.load(folder / "samples.npz")
    meta = read_meta(folder)
    asked = ~corpus.questions
    assert meta["n_inferred"] == 60 and meta["n_questions"] == 60 and samples["log_w"].shape == (120, 4)
    done = samples["finished"] & asked[:, None]
    np.testing.assert_allclose(samples["log_w"][done], samples["log_p"][done] - samples["log_q"][done])
    assert (samples["log_w"][asked][~samples["finished"][asked]] == -np.inf).all()
    assert (
        meta["cut_off"] == (~samples["finished"][asked]).sum()
        and meta["cut_off_share"] == meta["cut_off"] / 240
    )
    for i in range(corpus.n_chunks):
        picked = samples["pick"][i]
        assert (picked == -1) == (corpus.questions[i] or not samples["finished"][i].any())
        assert len(thoughts.span(i)) == (samples["length"][i, picked] - 1 if picked >= 0 else 0)
        assert picked == -1 or samples["finished"][i, picked], "a cut-off thought is never picked"
    assert out.count("-> log_q") == 2 and out.count("log_w") == 8 and 1 <= meta["ess"] <= 4
    assert list(folder.parent.iterdir()) == [folder], "no parts, no temporary files"


def test_the_rule_of_the_gain_as_a_command(digits, every_pick, whole):
    """--min_gain, on by default, drops the picks that gain too little, and no other. It counts them."""
    folders = {"off": every_pick[0], "on": whole[0]}
    off, on = (np.load(folders[name] / "samples.npz") for name in ("off", "on"))
    metas = {name: read_meta(folder) for name, folder in folders.items()}
    corpus, rows = open_corpus(digits / "raw"), np.arange(120)
    gain = (off["log_x"] - off["log_none"][:, None])[rows, off["pick"]]
    dropped = (off["pick"] >= 0) & (gain < 0)
    assert 0 < dropped.sum() < (off["pick"] >= 0).sum()
    np.testing.assert_array_equal(on["pick"], np.where(dropped, -1, off["pick"]))
    assert metas["on"]["no_gain"] == dropped.sum() and metas["off"]["no_gain"] == 0
    assert (metas["on"]["min_gain"], metas["off"]["min_gain"]) == (0.0, -1e9)
    assert metas["on"]["gain_picked"] > max(0, metas["off"]["gain_picked"])
    assert metas["on"]["gain"] == metas["off"]["gain"]
    assert f"dropped for a gain below 0 nats {dropped.sum()}" in whole[1]
    spans = open_thoughts(folders["on"], corpus)
    assert not any(len(spans.span(i)) for i in np.flatnonzero(dropped))
    refused = inside(infer_thoughts, "--min_gain=inf", code=1).stderr
    assert "--min_gain=inf: expected a finite number" in refused


def test_all_cut_off_gives_no_thought(digits, model, tmp_path):
    out = inside(infer_thoughts, *run_infer(digits, model, tmp_path / "E"), "--max_new=2").stdout
    meta = read_meta(tmp_path / "E")
    thoughts = open_thoughts(tmp_path / "E", open_corpus(digits / "raw"))
    assert meta["all_cut_off"] > 50 and f"all cut off {meta['all_cut_off']}" in out
    without = meta["all_cut_off"] + meta["no_gain"] + meta["empty_picks"]
    assert (np.diff(thoughts.chunks) > 0).sum() == 60 - without


def test_no_thought_ends_at_all(digits, tmp_path):
    """A model that has hardly been trained: nothing to weigh, and a report that says so."""
    train_on(digits, tmp_path / "M", "--max_steps=1", "--batch_size=2")
    hardly, tok = train.load_model(tmp_path / "M")
    hardly.norm.weight.data *= 100  # sure of its likeliest token, which is never EOL: that has logit 0
    hardly.embed_tokens.weight.data[tok.eol] = 0
    (tmp_path / "sure").mkdir()
    model_folder.save_model(tmp_path / "sure", hardly, tok)
    flags = ["--max_new=2", "--samples=2", "--seed=1", "--show=1"]
    flags = run_infer(digits, tmp_path / "sure", tmp_path / "E", *flags)
    out = inside(infer_thoughts, *flags).stdout
    meta, samples = read_meta(tmp_path / "E"), np.load(tmp_path / "E/samples.npz")
    assert meta["all_cut_off"] == meta["n_inferred"] == 60 and meta["cut_off"] == 120 and meta["no_gain"] == 0
    assert meta["gain"] is meta["gain_picked"] is meta["pick_not_uniform"] is None and meta["ess"] == 0
    assert "no thought ended" in out and "of the picks" not in out and "nan" not in out
    assert out.count("(cut off)") == 2
    asked = ~open_corpus(digits / "raw").questions
    alone, sol, none = (samples[f"log_{k}"][asked] for k in ("alone", "sol", "none"))
    expected = -np.logaddexp(alone, sol + np.log(infer_thoughts.NO_THOUGHT) + none)
    assert list(meta["nll_bound_chunk"].values()) == pytest.approx([expected.mean()] * 2), "all chunks count"
    assert not len(open_thoughts(tmp_path / "E", open_corpus(digits / "raw")).tokens)


@pytest.mark.parametrize("context", ["bare", "thoughts"])
def test_the_printed_bound_never_gains_by_cutting_off(digits, model, tmp_path, context):
    """Two problems a document, fewer and fewer thoughts that end: the figure printed may only get worse.

    With thoughts in the context, other cut-offs make other contexts: some hundredths of a nat a byte."""
    parts = ["--problems=2", "--warm=5", "--raw=30", "--heldout=4", "--max_ops=3", "--min_ops=1"]
    inside(data.digits, f"--out_dir={tmp_path}/data", *parts, f"--tokenizer={model}/tokenizer.json")
    flags = [f"--corpus={tmp_path}/data/raw", f"--model={model}", "--samples=1", "--workers=1"]
    found, cut = [], []
    for max_new in (2, 6, 10, 14, 18, 24, 80):
        more = [f"--out_dir={tmp_path}/{max_new}", f"--max_new={max_new}", f"--context={context}"]
        inside(infer_thoughts, *flags, *more)
        meta = read_meta(tmp_path / f"{max_new}")
        found.append(meta["nll_bound"]["1"])
        samples = np.load(tmp_path / f"{max_new}/samples.npz")
        # By the limit; after 60 steps of training a sixth of all thoughts write a marker, whatever it is.
        too_long = ~samples["finished"] & (samples["length"] == max_new)
        cut.append(too_long.sum() / meta["n_inferred"])
        assert cut[-1] <= meta["cut_off_share"]
    assert cut[0] > 0.9 and cut[-1] < 0.1 and cut == sorted(cut, reverse=True)
    assert min(found) > found[-1] - (1e-6 if context == "bare" else 0.03)
    assert context == "thoughts" or all(a > b - 1e-6 for a, b in zip(found, found[1:]))
    corpus = open_corpus(tmp_path / "data/raw")
    rows = np.flatnonzero(~corpus.questions)
    n_bytes = sum(len(corpus.tokenizer.decode(corpus.chunk(i)).encode()) for i in rows)
    likely = {k: np.exp(samples[f"log_{k}"][rows]) for k in ("alone", "sol", "none", "w")}
    e = infer_thoughts.NO_THOUGHT
    text = likely["alone"] + likely["sol"] * ((1 - e) * likely["w"][:, 0] + e * likely["none"])
    assert found[-1] == pytest.approx(-np.log(text).sum() / n_bytes), "of all chunks, over all their bytes"
    assert meta["nll_bound_chunk"]["1"] == pytest.approx(-np.log(text).mean())
    plain = likely["alone"] + likely["sol"] * likely["none"]
    assert meta["nll_thoughtless"] == pytest.approx(-np.log(plain).sum() / n_bytes)
    assert meta["nll_alone"] == pytest.approx(-np.log(likely["alone"]).sum() / n_bytes)


def test_parts_and_rows_change_nothing(digits, model, whole, tmp_path):
    inside(infer_thoughts, *run_infer(digits, model, tmp_path / "b"), "--part_size=1000", "--rows=9")
    assert (whole[0] / "tokens.bin").read_bytes() == (tmp_path / "b/tokens.bin").read_bytes()
    a, b = np.load(whole[0] / "samples.npz"), np.load(tmp_path / "b/samples.npz")
    np.testing.assert_allclose(a["log_w"], b["log_w"], atol=1e-3)
    assert (a["length"] == b["length"]).all()


SAME = ("tokens.bin", "chunks.npy", "meta.json", "samples.npz", "examples.txt")


def same_files(*folders) -> bool:
    return all(len({(folder / name).read_bytes() for folder in folders}) == 1 for name in SAME)


def kill_until_done(command, whole, folder, kills: int) -> None:
    """Two workers, started by hand, killed at random moments and started again, until `kills`
    are spent; then left to end.

    command makes folder / "killed"."""
    rng = random.Random(kills)
    said = open(folder / "stderr", "a")

    def start():
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=os.environ | ONE_THREAD)

    def compare():
        for worker in workers:
            assert worker.wait() in (0, -signal.SIGKILL), (folder / "stderr").read_text()
        assert same_files(whole, folder / "killed")
        assert sorted(p.name for p in folder.iterdir()) == ["killed", "stderr"], "nothing is left lying about"

    workers, done = [start(), start()], 0
    while done < kills:
        time.sleep(rng.uniform(0.2, 5))
        victim = rng.randrange(2)
        if workers[victim].poll() is None:
            workers[victim].kill()
            done += 1
        workers[victim].wait()
        if (folder / "killed").exists() and done < kills:  # they were quicker: once more from the start
            compare()
            shutil.rmtree(folder / "killed")
            workers = [start(), start()]
        else:
            workers[victim] = start()
    for worker in workers:
        assert worker.wait() == 0, (folder / "stderr").read_text()
    compare()


def test_killed_runs_go_on(digits, model, whole, tmp_path):
    flags = run_infer(digits, model, tmp_path / "killed")
    kill_until_done([sys.executable, str(ROOT / "infer_thoughts.py"), *flags], whole[0], tmp_path, kills=4)
    assert "complete" in inside(infer_thoughts, *flags).stdout
    assert "--seed=0 became 1" in inside(infer_thoughts, *flags, "--seed=1", code=1).stderr


@pytest.mark.long
def test_fifty_kills_with_two_workers(digits, model, whole, tmp_path):
    flags = run_infer(digits, model, tmp_path / "killed")
    kill_until_done([sys.executable, str(ROOT / "infer_thoughts.py"), *flags], whole[0], tmp_path, kills=50)


def test_workers_and_torchrun_write_the_same_bytes(digits, model, whole, tmp_path):
    """Helper processes of its own, or ranks of torchrun: the parts are shared out, the folder is the same."""
    helpers, ranks = tmp_path / "helpers", tmp_path / "ranks"
    script("infer_thoughts.py", *run_infer(digits, model, helpers, "--workers=3"), env=ONE_THREAD)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(ROOT / "infer_thoughts.py"), *run_infer(digits, model, ranks)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("log_q within") <= 1, "one rank speaks"
    assert same_files(whole[0], helpers, ranks)
    lines = [json.loads(line) for line in (helpers / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["part"] for line in lines) == [f"{n:06d}" for n in range(len(lines))]


def test_rules_of_selection_as_commands(digits, model, tmp_path):
    for rule in ("uniform", "argmax"):
        flags = [f"--select={rule}", "--min_gain=-inf"]
        inside(infer_thoughts, *run_infer(digits, model, tmp_path / rule), *flags)
    samples = {rule: np.load(tmp_path / rule / "samples.npz") for rule in ("uniform", "argmax")}
    assert np.array_equal(samples["uniform"]["log_w"], samples["argmax"]["log_w"], equal_nan=True)
    best = samples["argmax"]["pick"] >= 0
    assert (samples["argmax"]["pick"][best] == np.argmax(samples["argmax"]["log_w"][best], axis=1)).all()
    assert not np.array_equal(samples["uniform"]["pick"], samples["argmax"]["pick"])
    gone = {"--select=mcmc": "expected one of resample, argmax, uniform", "--previous=E": "no such setting"}
    for flag, message in gone.items():
        assert message in inside(infer_thoughts, flag, code=1).stderr


def test_the_report(digits, model, whole):
    folder, out = whole
    meta, samples = read_meta(folder), np.load(folder / "samples.npz")
    row = np.flatnonzero(~open_corpus(digits / "raw").questions)
    log_w, finished = samples["log_w"][row], samples["finished"][row]
    w = np.exp(log_w) / np.maximum(np.exp(log_w).sum(1, keepdims=True), 1e-300)
    assert meta["ess"] == pytest.approx(
        np.where(w.sum(1) > 0, 1 / np.maximum((w**2).sum(1), 1e-300), 0).mean()
    )
    gain = samples["log_x"][row] - samples["log_none"][row, None]
    assert meta["gain"] == pytest.approx(gain[finished].mean()) and meta["gain_picked"] > meta["gain"] - 5
    assert sum(meta["lengths"].values()) == finished.size and set(meta["nll_bound"]) == {"1", "2", "4"}
    assert 0 <= meta["weight_entropy"] <= np.log(4) and 0 <= meta["pick_not_uniform"] <= 0.75
    assert (
        meta["checked"]["chunks"] >= 1 and meta["checked"]["log_q"] < 1e-5 and meta["checked"]["log_p"] < 1e-5
    )
    assert 0 < meta["checked"]["log_q"] <= meta["checked"]["log_q_sum"] < 1e-4
    assert 0 < meta["checked"]["log_p"] <= meta["checked"]["log_p_sum"] < 1e-4
    for words in (
        "ess ",
        "entropy of weights",
        "gain of a thought",
        "tokens a thought",
        "nats a byte",
        "checked against",
        "plan: ",
        "-> log_q",
    ):
        assert words in out
    again = inside(infer_thoughts, *run_infer(digits, model, folder), "--show=2").stdout
    assert "complete" in again and again.count("chunk ") == 2, "a finished folder can be looked at, too"


def test_a_part_that_fails_stops_alone(toy_model, monkeypatch, tmp_path, capsys):
    work = Work(tmp_path / "E", [np.arange(3)] * 4)
    work.folder.mkdir()

    def run_part(path, *rest):
        if path.stem == "000001":
            raise UserError("chunk 1: log-probabilities are not finite")
        path.write_bytes(b"done")
        return {"part": path.stem}

    with pytest.raises(UserError, match="1 of 4 parts failed.* chunk 1: log-probabilities are not finite"):
        do_parts(work, run_part)
    assert [work.path(n).exists() for n in range(4)] == [True, False, True, True]
    assert "part 000001 failed" in capsys.readouterr().err


def test_a_part_missing_or_double_is_refused(digits, tmp_path):
    corpus = open_corpus(digits / "raw")
    s = infer_thoughts.Settings(corpus="", model=str(tmp_path), out_dir=str(tmp_path / "E"), samples=1)
    one = {k: np.zeros((1, 1)) for k in infer_thoughts.OF_SAMPLES}
    one |= {k: np.zeros(1) for k in infer_thoughts.OF_CHUNKS} | {
        "check": np.zeros((1, 2, 2)),
        "n_checked": np.zeros(1),
    }
    for n in range(2):
        one |= {"numbers": np.array([1]), "ids": np.zeros(0), "sizes": np.zeros(1, int)}
        np.savez(tmp_path / f"{n}.npz", examples=np.array([], str), **one)
    for paths in ([tmp_path / "0.npz"], [tmp_path / "0.npz", tmp_path / "1.npz"]):
        with pytest.raises(UserError, match="do not cover the corpus once"):
            infer_thoughts.join(paths, corpus, s, {"n_inferred": 2})
    assert not (tmp_path / "E").exists()


def test_odd_chunks(digits, model, tmp_path):
    """Empty chunks, chunks of a token, chunks at the exact limit and one token beyond: counted
    before any work starts, nothing lost.
    """
    tok = open_corpus(digits / "raw").tokenizer
    seq_len = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    word, room = " 7", seq_len - 6 - 24
    assert len(tok.encode_array(word)) == 1
    documents = [
        [("Start at 3.", True), (" The last digit is 3.", False)],
        [("", False), (word, False)],
        [(word * room, False)],
        [(word * (room + 1), False), (word, False)],
    ]
    write_corpus(tmp_path / "odd", documents, tok, {})
    flags = [f"--corpus={tmp_path}/odd", f"--model={model}", "--max_new=24"]
    for context in ("bare", "thoughts"):
        out = inside(infer_thoughts, *flags, f"--out_dir={tmp_path}/{context}", f"--context={context}").stdout
        assert "chunks: inferred 4, questions 1, empty 1, too long 1, short context 1" in out
        samples = np.load(tmp_path / context / "samples.npz")
        assert np.flatnonzero(np.isnan(samples["log_none"])).tolist() == [0, 2, 5]
        assert open_thoughts(tmp_path / context, open_corpus(tmp_path / "odd")).chunks.shape == (8,)


def test_broken_weights_and_missing_markers(digits, model, tmp_path):
    broken, tok = train.load_model(model)
    broken.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    (tmp_path / "nan").mkdir()
    model_folder.save_model(tmp_path / "nan", broken, tok)
    done = inside(infer_thoughts, *run_infer(digits, tmp_path / "nan", tmp_path / "E"), code=1)
    assert (
        "layers.1.mlp.up_proj.weight holds NaN or infinite values" in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert not list(tmp_path.glob("E*"))


def test_a_full_disk_loses_nothing(digits, model, whole, tmp_path):
    """No part can be written: one line, no half file; with space again the same command goes
    on to the same bytes.
    """
    import resource

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    flags = run_infer(digits, model, tmp_path / "E")
    command = [sys.executable, str(ROOT / "infer_thoughts.py"), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limited, env=os.environ | ONE_THREAD
    )
    path = tmp_path / "E.parts/000000.npz"
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0, done.stderr
    assert f"infer_thoughts.py: error: {path}: File too large" in done.stderr, done.stderr
    assert not (tmp_path / "E").exists() and not list((tmp_path / "E.parts").glob("*.tmp"))
    script("infer_thoughts.py", *flags, env=ONE_THREAD)
    assert same_files(whole[0], tmp_path / "E")


def test_whole_documents_stay_in_a_part():
    corpus = corpus_of([[[0]] * 3, [[0]] * 1, [[0]] * 5, [[0]] * 2])
    parts = split_parts(corpus, np.arange(11), 4)
    assert [p.tolist() for p in parts] == [[0, 1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]
    assert [p.tolist() for p in split_parts(corpus, np.array([1, 2, 9]), 1)] == [[1, 2], [9]]


def test_context_with_thoughts_as_a_command(digits, model, tmp_path, monkeypatch):
    asked, generate = [], Engine.generate

    def recorded(engine, prompts, *rest, **more):
        asked.append(max(map(len, prompts)))
        return generate(engine, prompts, *rest, **more)

    monkeypatch.setattr(Engine, "generate", recorded)
    parts = ["--problems=3", "--warm=5", "--raw=12", "--heldout=4", "--max_ops=3", "--min_ops=1"]
    inside(data.digits, f"--out_dir={tmp_path}/data", *parts, f"--tokenizer={model}/tokenizer.json")
    flags = [f"--corpus={tmp_path}/data/raw", f"--model={model}", "--max_new=24"]
    for context in ("bare", "thoughts"):
        out = [f"--out_dir={tmp_path}/{context}", f"--context={context}"]
        done = inside(infer_thoughts, *flags, *out, "--part_size=10", "--workers=1")
        planned = int(done.stdout.split("prompts of up to ")[1].split()[0])
        assert max(asked) <= planned < 512 - 24, "what is planned holds all prompts, and not the whole model"
    bare, thoughts = (np.load(tmp_path / name / "samples.npz")["log_w"] for name in ("bare", "thoughts"))
    first, second = np.arange(12) * 6 + 1, np.arange(12) * 6 + 3  # answers; chunks are question, answer, ...
    np.testing.assert_allclose(bare[first], thoughts[first], atol=1e-3)
    assert not np.allclose(bare[second], thoughts[second], atol=1e-3)


def test_other_tokenizer_and_nothing_to_infer(digits, model, tmp_path):
    inside(data.digits, f"--out_dir={tmp_path}/other", "--warm=5", "--raw=5", "--heldout=5", "--n_vocab=256")
    flags = [f"--corpus={tmp_path}/other/raw", f"--model={model}", f"--out_dir={tmp_path}/E"]
    assert "another tokenizer" in inside(infer_thoughts, *flags, code=1).stderr
    done = inside(infer_thoughts, *run_infer(digits, model, tmp_path / "E"), "--max_new=5000", code=1)
    assert "no chunk to infer" in done.stderr and "'n_too_long': 60" in done.stderr
    assert not (tmp_path / "E").exists()
    assert POSTERIOR == 2
