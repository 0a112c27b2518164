"""The loss and training against plain loops and transformers, the optimisers, the data stream, the command, and exact resume."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TOY, corpus_of, script

import train
from data.lib import checkpoint, kernels, model_folder, plan
from data.lib.corpus import POSTERIOR, PRIOR, RAW, open_corpus
from data.lib.safetensors import read_safetensors
from data.lib.stream import Batch, Stream, pad
from data.lib.tokenizer import make_tokenizer

SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "seq_len": 64}


def small_model(n_vocab=40, seed=0, **change):
    s = train.Settings(seed=seed, **(SMALL | change))
    return train.start_model(s, train.make_config(s, n_vocab), None, None, "cpu")


# ---------------------------------------------------------------------------------------------- optimisers


def test_newton_schulz_orthogonalises():
    for shape in ((3, 20, 50), (2, 50, 20), (1, 16, 16)):
        x = train.newton_schulz(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        singular = torch.linalg.svdvals(x)
        assert x.shape == shape and 0.3 < singular.min() and singular.max() < 1.3
    g = torch.randn(1, 12, 30)
    u, _, v = torch.linalg.svd(g[0], full_matrices=False)
    assert torch.nn.functional.cosine_similarity(train.newton_schulz(g)[0].flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_newton_schulz_equals_the_formula():
    """As Jordan et al. write it: x -> a x + (b A + c A^2) x with A = x x^T, whichever side of x is the longer."""
    for shape in ((2, 20, 50), (2, 50, 20), (1, 16, 16)):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for matrix, got in zip(g, train.newton_schulz(g)):
            x = matrix / matrix.norm()
            for _ in range(5):
                A = x @ x.T
                x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
            torch.testing.assert_close(got, x, atol=1e-6, rtol=0)  # the norm has 1e-7 added


def test_muon_equals_a_plain_loop():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 16), (16, 8), (8, 16))]
    expected, momenta = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    optimizer = train.Muon(params, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            momenta[i] = 0.95 * momenta[i] + 0.05 * p.grad
            nesterov = 0.05 * p.grad + 0.95 * momenta[i]
            update = train.newton_schulz(nesterov[None])[0] * max(1, p.shape[0] / p.shape[1]) ** 0.5
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * update
        optimizer.step()
    for p, e in zip(params, expected):
        torch.testing.assert_close(p.detach(), e, atol=1e-5, rtol=1e-5)


def test_every_parameter_has_one_optimiser():
    for kind, n in (("muon", 2), ("adamw", 1)):
        model = small_model()
        s = train.Settings(optimizer=kind, **SMALL)
        groups = [p for o in train.make_optimizers(model, s) for g in o.param_groups for p in g["params"]]
        assert len(groups) == len(set(map(id, groups))) == len(list(model.parameters())) and len(train.make_optimizers(model, s)) == n


def test_schedule():
    shares = [train.schedule(step, 100, 10, 0.1) for step in range(101)]
    assert shares[0] == 0.1 and shares[9] == shares[10] == 1 and shares[55] == pytest.approx(0.55) and shares[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(shares[10:], shares[11:])) and train.schedule(0, 10, 0, 0.0) == 1
    wsd = [train.schedule(step, 100, 10, 0.1, "wsd") for step in range(101)]
    assert wsd[:11] == shares[:11] and wsd[10] == wsd[80] == 1 and wsd[90] == pytest.approx(0.55) and wsd[100] == pytest.approx(0.1)


def packed_stream(attention="packed", n_docs=40, seq_len=16, seed=0, **more):
    """A stream of small documents, a third of whose chunks have thoughts."""
    rng = np.random.default_rng(1)
    corpus = corpus_of([[rng.integers(0, 2, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 4))] for _ in range(n_docs)])
    return Stream([corpus], [carried([[0, 1][: i % 3] for i in range(corpus.n_chunks)])], TOY, seq_len, seed, attention, **more)


def carried(spans: list[list[int]]) -> SimpleNamespace:
    """Thoughts in memory."""
    offsets = np.cumsum([0] + [len(z) for z in spans])
    return SimpleNamespace(tokens=np.concatenate([np.array(z, dtype=np.int64) for z in spans]), chunks=offsets, span=lambda i: np.array(spans[i], dtype=np.int64))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("attention", ["padded", "packed", "document"])
def test_accumulation_changes_nothing(optimizer, attention):
    after = []
    for groups in (1, 3):
        s = train.Settings(optimizer=optimizer, **SMALL)
        model, stream = small_model(8), packed_stream(attention)
        optimizers = train.make_optimizers(model, s)
        losses = [
            train.train_step(model, optimizers, stream.micro_batches(12 * i, 12, groups, slice(None)), stream.n_targets(12 * i, 12), s, "cpu")[0].item()
            for i in range(3)
        ]
        after.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert after[0][0] == pytest.approx(after[1][0], abs=1e-5)
    torch.testing.assert_close(after[0][1], after[1][1], atol=1e-4, rtol=1e-3)


def test_recompute_changes_nothing():
    ids = torch.randint(0, 40, (3, 30), generator=torch.Generator().manual_seed(0))
    model, grads = small_model(), []
    for model.layers[0].recompute in (False, True):
        model.layers[1].recompute = model.layers[0].recompute
        model(ids[:, :-1], targets=ids[:, 1:]).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_document_attention_is_a_document_a_row():
    """Packed with attention within documents, the loss is that of each document by itself, but for EOS -> BOS between two."""
    model = small_model(8)
    stream = packed_stream("document", n_docs=9, seq_len=400)  # one row holds them all, and starts again
    [batch] = stream.micro_batches(0, 1, 1, slice(None))
    assert len(set(batch.documents[0].tolist())) > 9
    keep = batch.targets != TOY.bos
    whole = model(batch.ids, targets=torch.where(keep, batch.targets, -1), documents=batch.documents).item()
    row = torch.cat((batch.ids[0], batch.targets[0, -1:]))
    cuts = [*(row == TOY.bos).nonzero()[:, 0].tolist(), len(row)]
    alone = sum(model(row[None, a : b - 1], targets=row[None, a + 1 : b]).item() for a, b in zip(cuts, cuts[1:]) if b - a > 1)
    assert whole == pytest.approx(alone, rel=1e-5)
    assert model(batch.ids, targets=torch.where(keep, batch.targets, -1)).item() != pytest.approx(alone, rel=1e-3)  # across documents


@pytest.mark.parametrize("shape", [(2, 6, 2, 150, 16), (3, 2, 1, 64, 8), (1, 4, 4, 65, 32), (2, 3, 3, 7, 8)])  # B, heads, key heads, T, d
def test_causal_attention_equals_torchs(shape):
    B, n, n_kv, T, d = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, h, d).transpose(1, 2).requires_grad_() for h in (n, n_kv, n_kv))
    dy, results = torch.randn(B, n, T, d), []
    for f in (kernels.CausalAttention.apply, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=n != n_kv)):
        y = f(q, k, v)
        results.append((y, *torch.autograd.grad(y, (q, k, v), dy)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    rounded = kernels.CausalAttention.apply(*(x.bfloat16() for x in (q, k, v)))
    torch.testing.assert_close(rounded.float(), results[1][0], atol=0.03, rtol=0.03)


# ---------------------------------------------------------------------------------------------------- loss


def plain_loss(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=-1, reduction="sum")


@pytest.mark.parametrize("keep", [0, 1 << 30])  # logits computed again in the backward pass, or kept
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_loss_equals_the_plain_one(keep, dtype, monkeypatch):
    monkeypatch.setattr(kernels.HeadLoss, "KEEP", keep)
    monkeypatch.setattr(kernels.HeadLoss, "PIECE", {"cpu": 4 * 50 * 7})  # many pieces, the last one smaller
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 25, 16, dtype=dtype), torch.randn(99, 16, dtype=dtype)
    targets = torch.randint(0, 99, (2, 25))
    targets[0, 3:9] = -1
    results = []
    for f in (kernels.HeadLoss.apply, kernels.head_loss, plain_loss):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        arguments = (h, w, targets) if f is kernels.head_loss else (h.flatten(0, 1), w, targets.flatten())
        loss = f(*arguments)
        (0.125 * loss).backward()
        results.append((loss.detach(), h.grad.float(), w.grad.float()))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for got in results[:2]:
        for ours, reference in zip(got, results[2]):
            assert (ours - reference).abs().max() <= tolerance * reference.abs().max()


def test_head_loss_of_padding_only():
    h, w = torch.randn(1, 3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = kernels.head_loss(h, w, torch.full((1, 3), -1))
    loss.backward()
    assert loss == 0 and not h.grad.any() and not w.grad.any()


def test_head_loss_takes_little_memory():
    """4 x 2048 tokens, 32,004 classes, width 2048 in bf16: at most 300 MB above inputs and gradients (the plain loss: 3,000).
    Minutes on a CPU without fast bf16."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    extra = json.loads(script("tests/bench_loss.py", "--which=ours", timeout=900).stdout)["extra_MB"]
    assert extra <= 300


def test_fifty_steps_equal_transformers(tmp_path):
    """Beside a plain loop with transformers' model and torch's AdamW, from the same weights, on the same batches."""
    transformers = pytest.importorskip("transformers")
    tok = make_tokenizer()
    s = train.Settings(n_layer=6, n_embd=256, n_head=8, n_kv_head=4, seq_len=64, rope_theta=1e4, optimizer="adamw", lr=1e-3, max_steps=50, clip=1.0, weight_decay=0.01)
    model = train.start_model(s, train.make_config(s, tok.n_vocab), None, None, "cpu")
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 6e6
    model_folder.save_model(tmp_path, model, tok)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    optimizers, rng = train.make_optimizers(model, s), np.random.default_rng(0)
    for step in range(50):
        start = rng.integers(0, 200, (4, 1))
        ids = torch.from_numpy((start + np.arange(65) * rng.integers(1, 4, (4, 1))) % 250)  # something to learn
        for group in (*optimizers[0].param_groups, *plain.param_groups):
            group["lr"] = 1e-3 * train.schedule(step, 50, 10, 0.0)
        ours, norm = train.train_step(model, optimizers, [Batch(ids[:, :-1], ids[:, 1:], None)], 4 * 64, s, "cpu")
        loss = F.cross_entropy(reference(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        theirs_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        plain.step()
        plain.zero_grad()
        assert ours.item() == pytest.approx(loss.item(), abs=1e-3), step
        assert norm.item() == pytest.approx(theirs_norm.item(), rel=0.02), step
    assert loss.item() < 2.5


def test_loss_equals_transformers():
    transformers = pytest.importorskip("transformers")
    import tempfile

    tok = make_tokenizer()
    model = small_model(tok.n_vocab)
    sequences = [np.array(tok.encode(text)) for text in ("Start at 3.", "Add", "Multiply by 9. And again.")]
    with tempfile.TemporaryDirectory() as folder:
        model_folder.save_model(folder, model, tok)
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = sum(reference(torch.tensor(ids[None]), labels=torch.tensor(ids[None])).loss.item() * (len(ids) - 1) for ids in sequences)
    ids, targets = pad(sequences, "cpu")
    assert model(ids, targets=targets).item() == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- data


def padded_stream(n: int, seed=0, seq_len=64) -> Stream:
    corpus = corpus_of([[[0] * (i % 5 + 1), [1, i % 2]] for i in range(n)])
    return Stream([corpus], [carried([z for i in range(n) for z in ([], [i % 2])])], TOY, seq_len, seed)


def test_stream_covers_each_epoch_once_and_depends_on_the_position_only():
    data = padded_stream(50)
    first = [data.padded_row(i).tolist() for i in range(150)]
    assert [padded_stream(50).padded_row(i).tolist() for i in (149, 3, 77)] == [first[149], first[3], first[77]]
    for epoch in range(3):
        assert sorted(data.epoch(epoch).doc) == list(range(50))
    assert first[:50] != first[50:100] and [padded_stream(50, seed=1).padded_row(i).tolist() for i in (0, 1)] != first[:2]


def test_forms_are_fair_coins_drawn_anew_each_epoch():
    data = padded_stream(200)
    form = np.array([[PRIOR if TOY.pri in data.document(0, doc, epoch) else POSTERIOR for doc in range(200)] for epoch in range(20)])
    share = (form == PRIOR).mean()
    assert abs(share - 0.5) < 0.03 and abs((form[0] == form[1]).mean() - 0.5) < 0.15


def test_completion_loss_is_of_what_answers_a_question():
    """--loss=completion: targets are the thought with its EOL, the answer and EOS; questions and markers are read; the form is always the prior."""
    corpus = corpus_of([[[0, 1], [1, 1, 0]], [[1], [0]]], questions=[True, False, True, False])
    for thoughts in ([carried([[], [0], [], []])], [None]):
        data = Stream([corpus], thoughts, TOY, 64, 0, completion=True)
        for row in range(4):
            ids, targets, _ = data.micro_batch([row])
            whole = [*ids[0].tolist(), int(targets[0, -1])]
            learned = [t for t in targets[0].tolist() if t >= 0]
            if whole[1:3] == [0, 1]:
                middle = [TOY.sol, TOY.pri, 0, TOY.eol] if thoughts[0] else []
                assert whole == [TOY.bos, 0, 1, *middle, 1, 1, 0, TOY.eos] and learned == [*middle[2:], 1, 1, 0, TOY.eos]
            else:
                assert whole == [TOY.bos, 1, 0, TOY.eos] and learned == [0, TOY.eos]
            assert data.n_targets(row, 1) == len(learned)
    first, _, _ = data.micro_batch([0, 1])
    assert first.min() >= 0  # padding and given tokens are ids again


def test_completion_loss_needs_questions(tmp_path, digits):
    done = script("train.py", f"--corpus={digits}/warm", "--loss=completion", "--attention=packed", f"--out_dir={tmp_path}/m", code=1)
    assert "--loss=completion: needs" in done.stderr


def test_bare_chunks():
    """--bare: that share of the chunks with a thought is written without it; the others stay fair coins, and lengths stay exact."""
    data = padded_stream(200)
    data.bare = 0.3
    rows = [[data.document(0, doc, epoch) for doc in range(200)] for epoch in range(20)]
    form = np.array([[PRIOR if TOY.pri in ids else POSTERIOR if TOY.pos in ids else RAW for ids in row] for row in rows])
    assert [(form == f).mean() for f in (RAW, PRIOR, POSTERIOR)] == pytest.approx([0.3, 0.35, 0.35], abs=0.03)
    assert all((data.lengths(0, epoch) == [len(ids) for ids in row]).all() for epoch, row in enumerate(rows))


def test_lengths_are_exact_and_so_is_their_mean_on_average():
    data = padded_stream(300)
    lengths = np.array([[len(data.document(0, doc, epoch)) for doc in range(300)] for epoch in range(10)])
    assert all((data.lengths(0, epoch) == lengths[epoch]).all() for epoch in range(10))
    assert data.mean_length(0) == pytest.approx(lengths.mean(), rel=0.01)


def test_long_documents_are_cut_and_counted():
    data = padded_stream(10)
    whole = [data.padded_row(i).tolist() for i in range(25)]
    data.seq_len = 6
    assert [data.padded_row(i).tolist() for i in range(25)] == [ids[:6] for ids in whole]
    assert data.cut_tokens(25) == sum(max(0, len(ids) - 6) for ids in whole) > 0


@pytest.mark.parametrize("attention", ["packed", "document"])
def test_packed_rows_are_the_documents_end_to_end(attention):
    data = packed_stream(attention)
    tokens = [ids for epoch in range(3) for e in [data.epoch(epoch)] for args in zip(e.source, e.doc, e.turn) for ids in data.make_document(*args)]
    n = len(tokens) // 16 - 1
    [batch] = packed_stream(attention).micro_batches(0, n, 1, slice(None))
    assert batch.ids.flatten().tolist() == tokens[: n * 16] and batch.targets.flatten().tolist() == tokens[1 : n * 16 + 1]
    [late] = packed_stream(attention).micro_batches(n - 2, 2, 1, slice(None))  # without having read what is before
    assert torch.equal(late.ids, batch.ids[-2:])
    if attention == "document":
        for ids, documents in zip(batch.ids, batch.documents):
            new = documents[1:] != documents[:-1]
            assert torch.equal(new, ids[1:] == TOY.bos)


@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_ranks_and_micro_batches_only_divide_the_stream(attention):
    whole = packed_stream(attention).micro_batches(24, 12, 1, slice(None))
    for n_ranks, micro_steps in ((2, 1), (4, 3), (3, 2)):
        parts = [packed_stream(attention).micro_batches(24, 12, n_ranks * micro_steps, slice(r, None, n_ranks)) for r in range(n_ranks)]
        assert all(len(part) == micro_steps for part in parts)
        rows = [ids[targets >= 0].tolist() for part in parts for batch in part for ids, targets in zip(batch.ids, batch.targets)]
        assert sorted(rows) == sorted(ids[targets >= 0].tolist() for ids, targets in zip(whole[0].ids, whole[0].targets))


def test_mixing_follows_the_weights_and_covers_every_corpus():
    corpora = [corpus_of([[[0] * 9] for _ in range(300)]), corpus_of([[[1] * 19] for _ in range(50)])]
    data = Stream(corpora, [None, None], TOY, 32, 0, "packed", weights=[0.25, 0.75])
    rows = np.concatenate([data.packed_row(n)[0][1:] for n in range(400)])
    share = (rows == 1).sum() / np.isin(rows, (0, 1)).sum()
    assert share == pytest.approx(0.75 * 19 / 21 / (0.75 * 19 / 21 + 0.25 * 9 / 11), abs=0.02)  # weights count BOS and EOS, too
    turns = [data.epoch(e) for e in range(40)]
    seen = np.bincount(np.concatenate([e.doc[e.source == 0] for e in turns]), minlength=300)
    assert seen.max() - seen.min() <= 1 and all((np.bincount(e.doc[e.source == 1], minlength=50) == 1).all() for e in turns)
    order = data.epoch(0).source
    assert (np.diff(order) != 0).sum() > 10  # shuffled together, not one after the other
    by_size = Stream(corpora, [None, None], TOY, 32, 0, "packed")
    assert by_size.takes == [300, 50]


# --------------------------------------------------------------------------------------------- the command

QUICK = ["--n_layer=2", "--n_embd=32", "--batch_size=8", "--max_steps=60", "--save_every=5", "--log_every=5"]


def run_train(digits, out, *flags):
    return [f"--corpus={digits}/warm", f"--thoughts={digits}/warm_thoughts", f"--out_dir={out}", *QUICK, *flags]


def test_learns_and_reports(digits, tmp_path):
    out = tmp_path / "model"
    script("train.py", *run_train(digits, out, f"--val_corpus={digits}/heldout", f"--val_thoughts={digits}/heldout_truth", "--val_every=30"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses, validation = [r["loss"] for r in lines if "loss" in r], [r["val_loss"] for r in lines if "val_loss" in r]
    assert losses[-1] < 0.5 * losses[0] and len(losses) == 12 and len(validation) == 2 and validation[1] < validation[0] < 6
    report = json.loads((out / "training.json").read_text())
    corpus = open_corpus(digits / "warm")
    assert report["steps"] == 60 and report["train_tokens"] > 60 * 8 * len(corpus.tokens) / corpus.n_docs
    assert not list(out.glob("*.tmp")) and not (out / "checkpoint.pt").exists()
    assert (
        "complete"
        in script(
            "train.py", *run_train(digits, out, f"--val_corpus={digits}/heldout", f"--val_thoughts={digits}/heldout_truth", "--val_every=30")
        ).stdout
    )
    assert "--lr=0.01 became 0.5" in script("train.py", *run_train(digits, out, "--lr=0.5"), code=1).stderr


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_plan_is_what_a_model_takes(optimizer):
    s = train.Settings(n_layer=4, n_embd=128, n_head=4, n_kv_head=2, seq_len=128, batch_size=4, optimizer=optimizer, attention="packed")
    c = train.make_config(s, 1000)
    model = train.start_model(s, c, None, None, "cpu")
    weights, kept, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        held.append(t)  # so that no address is used twice
        return t

    ids = torch.randint(0, 1000, (4, 129))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(ids[:, :-1], targets=ids[:, 1:])
    loss.backward()
    parts, n = plan.memory(c, s, 1, 4, 1), sum(p.numel() for p in model.parameters())
    state = sum(v.numel() for o in train.make_optimizers(model, s) for values in o.state.values() for v in values.values() if v.ndim)
    assert parts["weights"] == parts["gradients"] == 4 * n == 4 * sum(p.grad.numel() for p in model.parameters())
    assert parts["optimiser"] == 4 * state and parts["their copies for computing"] == 0
    assert sum(kept.values()) == pytest.approx(parts["activations"] + 4 * 512 * 1000, rel=0.25)
    s.recompute = True
    assert plan.memory(c, s, 1, 4, 1)["activations"] < 0.5 * parts["activations"]
    assert plan.memory(c, s, 8, 4, 2)["weights"] == parts["weights"] / 8


def test_flops_by_hand():
    s = train.Settings(n_layer=3, n_embd=32, n_head=4, n_kv_head=2, n_hidden=80, tie_embeddings=False)
    n = 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 80 + 2 * 32) + 32 + 500 * 32
    assert plan.flops_per_token(train.make_config(s, 500), 100) == 6 * n + 12 * 3 * 32 * 100


def test_plan_prints_and_writes_nothing(digits, tmp_path):
    out = script("train.py", *run_train(digits, tmp_path / "m", "--plan")).stdout
    assert all(word in out for word in ("of thoughts", "parameters", "weights", "gradients", "optimiser", "activations", "logits", "FLOPs", "hours", "epochs"))
    assert not (tmp_path / "m").exists()
    big = ["--preset=tinyllama-1.1b", "--plan"]
    out = script("train.py", *big, "--plan_device=8xH100").stdout
    assert "1,100,064,768" in out and "33,060, 12,999,720,960 tokens" in out and "8 x H100" in out
    assert "lower --micro_batch" in script("train.py", *big, "--plan_device=3090", code=1).stderr
    assert "expected a number and one of" in script("train.py", *big, "--plan_device=8xabacus", code=1).stderr


def test_token_budget(digits, tmp_path):
    script("train.py", f"--corpus={digits}/raw", f"--out_dir={tmp_path}/m", *QUICK, "--max_tokens=5000")
    assert json.loads((tmp_path / "m/training.json").read_text())["train_tokens"] == pytest.approx(5000, rel=0.05)


def newest_checkpoint(out) -> str:
    return max((p.name for p in (out / "checkpoints").glob("*") if p.name.isdigit()), default="")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_runs_end_in_the_same_weights(digits, tmp_path, how):
    script("train.py", *run_train(digits, tmp_path / "whole"))
    command = [sys.executable, str(ROOT / "train.py"), *run_train(digits, tmp_path / "killed")]
    for n in (1, 2):  # kill after the first checkpoints of each run
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        before, deadline = newest_checkpoint(tmp_path / "killed"), time.time() + 60
        while newest_checkpoint(tmp_path / "killed") == before and time.time() < deadline and child.poll() is None:
            time.sleep(0.005)
        child.send_signal(how)
        _, err = child.communicate(timeout=60)
        assert not (tmp_path / "killed/config.json").exists(), n
        assert child.returncode == (-how if how == signal.SIGKILL else 128 + how)
        assert how == signal.SIGKILL or ("interrupted; saved step" in err and "Traceback" not in err)
    done = script("train.py", *run_train(digits, tmp_path / "killed"))
    assert "from step 0" not in done.stdout and not (tmp_path / "killed/checkpoints").exists()
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "killed/model.safetensors").read_bytes()


def interrupted(digits, out, *flags):
    """A run that was stopped behind its third checkpoint."""
    child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *run_train(digits, out, *flags)], stderr=subprocess.PIPE, text=True)
    while newest_checkpoint(out) < "00000015" and child.poll() is None:
        time.sleep(0.005)
    child.terminate()
    assert child.wait(60) == 128 + signal.SIGTERM


def test_only_the_newest_checkpoints_are_kept_and_a_damaged_one_is_named(digits, tmp_path):
    interrupted(digits, tmp_path / "m", "--keep=2")
    kept = sorted(p.name for p in (tmp_path / "m/checkpoints").iterdir())
    assert len(kept) == 2 and kept[0] >= "00000010"
    newest = tmp_path / "m/checkpoints" / kept[1]
    for file in newest.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    done = script("train.py", *run_train(digits, tmp_path / "m", "--keep=2"), code=1)
    assert f"{newest}: damaged" in done.stderr and done.stderr.count("\n") == 1
    shutil.rmtree(newest)
    assert f"from step {int(kept[0])}" in script("train.py", *run_train(digits, tmp_path / "m", "--keep=2")).stdout


def test_how_the_work_is_done_may_change_on_resume_but_not_what_comes_out(digits, tmp_path):
    interrupted(digits, tmp_path / "m")
    assert "--seed=0 became 1" in script("train.py", *run_train(digits, tmp_path / "m", "--seed=1"), code=1).stderr
    script("train.py", *run_train(digits, tmp_path / "m", "--micro_batch=3", "--recompute"))
    script("train.py", *run_train(digits, tmp_path / "whole"))
    a, b = (read_safetensors(tmp_path / f"{name}/model.safetensors") for name in ("m", "whole"))
    assert all((a[k] - b[k]).abs().max() < 0.02 for k in a)


def test_a_full_disk_and_a_folder_that_cannot_be_written_end_in_one_line(digits, tmp_path):
    import resource

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, str(ROOT / "train.py"), *run_train(digits, tmp_path / "full")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "full/checkpoints/00000005" in done.stderr and "File too large" in done.stderr
    assert not newest_checkpoint(tmp_path / "full")
    (tmp_path / "file").write_text("")
    done = script("train.py", *run_train(digits, tmp_path / "file/m"), code=1)
    assert done.stderr.count("\n") == 1 and str(tmp_path / "file") in done.stderr


@pytest.mark.slow
def test_thirty_kills_at_random_moments(digits, tmp_path):
    """SIGKILL whenever it comes: every checkpoint under a final name can be read, and the weights end up as in an undisturbed run."""
    flags = ["--max_steps=200", "--save_every=10", "--attention=packed", "--seq_len=64"]
    script("train.py", *run_train(digits, tmp_path / "whole", *flags))
    expected, rng, kills, round_ = (tmp_path / "whole/model.safetensors").read_bytes(), random.Random(0), 0, 0
    settings = train.Settings(n_layer=2, n_embd=32, seq_len=64)
    model = train.start_model(settings, train.make_config(settings, open_corpus(digits / "warm").tokenizer.n_vocab), None, None, "cpu")
    optimizers, seen = train.make_optimizers(model, settings), set()
    while kills < 30:
        out = tmp_path / f"killed{round_}"
        child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *run_train(digits, out, *flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            child.wait(rng.uniform(0.5, 6))
            assert child.returncode == 0, child.communicate()
            assert (out / "model.safetensors").read_bytes() == expected
            round_ += 1
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            kills += 1
            steps = [int(path.name) for path in checkpoint.checkpoints(out)]
            seen |= {*steps}
            if steps:  # each, not only the newest
                for path in checkpoint.checkpoints(out):
                    single = tmp_path / "single"
                    shutil.rmtree(single, ignore_errors=True)
                    shutil.copytree(path, single / "checkpoints" / path.name)
                    assert checkpoint.load_checkpoint(single, model, optimizers)[0] == int(path.name)
    script("train.py", *run_train(digits, tmp_path / f"killed{round_}", *flags))
    assert (tmp_path / f"killed{round_}/model.safetensors").read_bytes() == expected
    print(f"{kills} kills in {round_ + 1} runs, {len(seen)} different checkpoints read")


def test_a_model_of_somebody_else_is_not_taken_for_a_finished_run(digits, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "did not make" in script("train.py", *run_train(digits, tmp_path), code=1).stderr
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_exploding_loss_is_refused(digits, tmp_path):
    done = script("train.py", *run_train(digits, tmp_path / "m", "--lr=1e30", "--optimizer=adamw", "--clip=0"), code=1)
    assert "lower --lr" in done.stderr and not (tmp_path / "m/config.json").exists()


def test_other_tokenizer_is_refused(digits, tmp_path):
    script("data/digits.py", f"--out_dir={tmp_path}/other", "--warm=5", "--raw=5", "--heldout=5", "--n_vocab=256")
    flags = [f"--corpus={digits}/warm", f"--val_corpus={tmp_path}/other/heldout", f"--out_dir={tmp_path}/m", *QUICK]
    assert "another tokenizer" in script("train.py", *flags, code=1).stderr
