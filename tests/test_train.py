"""The loss and training against plain loops and transformers, the optimisers, the stream, the
command, and exact resume."""

import json
import math
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
from conftest import ROOT, TOY, corpus_of, inside, script

import train
from data import digits as digits_command
from data.lib import checkpoint, kernels, model_folder, plan
from data.lib.cli import UserError
from data.lib.corpus import POSTERIOR, PRIOR, RAW, open_corpus, write_corpus
from data.lib.safetensors import read_safetensors
from data.lib.stream import Batch, Document, Rows, Stream, pad
from data.lib.tokenizer import make_tokenizer

SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "seq_len": 64}
ALL = slice(None)  # the micro-batches of all ranks


def small_model(n_vocab=40, seed=0, **change):
    s = train.Settings(seed=seed, **(SMALL | change))
    return train.start_model(s, train.make_config(s, n_vocab), None, None, "cpu")


# ---------------------------------------------------------------------------- optimisers


def test_newton_schulz_orthogonalises():
    for shape in ((3, 20, 50), (2, 50, 20), (1, 16, 16)):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x = train.newton_schulz(g)
        singular = torch.linalg.svdvals(x)
        assert x.shape == shape
        assert 0.3 < singular.min() and singular.max() < 1.3
    g = torch.randn(1, 12, 30)
    u, _, v = torch.linalg.svd(g[0], full_matrices=False)
    x = train.newton_schulz(g)[0]
    assert F.cosine_similarity(x.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_newton_schulz_equals_the_formula():
    """As Jordan et al. write it: x -> a x + (b A + c A^2) x with A = x x^T, whichever side of x
    is the longer."""
    for shape in ((2, 20, 50), (2, 50, 20), (1, 16, 16)):
        generator = torch.Generator().manual_seed(1)
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        for matrix, got in zip(g, train.newton_schulz(g)):
            x = matrix / matrix.norm()
            for _ in range(5):
                A = x @ x.T
                x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
            torch.testing.assert_close(got, x, atol=1e-6, rtol=0)  # the norm has 1e-7 added


def test_muon_equals_a_plain_loop():
    torch.manual_seed(0)
    shapes = ((8, 16), (16, 8), (8, 16))
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected = [p.detach().clone() for p in params]
    momenta = [torch.zeros_like(p) for p in params]
    optimizer = train.Muon(params, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            momenta[i] = 0.95 * momenta[i] + 0.05 * p.grad
            nesterov = 0.05 * p.grad + 0.95 * momenta[i]
            scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
            update = train.newton_schulz(nesterov[None])[0] * scale
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * update
        optimizer.step()
    for p, e in zip(params, expected):
        torch.testing.assert_close(p.detach(), e, atol=1e-5, rtol=1e-5)


def test_every_parameter_has_one_optimiser():
    for kind, n in (("muon", 2), ("adamw", 1)):
        model = small_model()
        optimizers = train.make_optimizers(model, train.Settings(optimizer=kind, **SMALL))
        groups = train.parameter_groups(optimizers)
        held = [id(p) for group in groups for p in group["params"]]
        assert len(held) == len(set(held)) == len(list(model.parameters()))
        assert len(optimizers) == n


def test_schedule():
    shares = [train.schedule(step, 100, 10, 0.1) for step in range(101)]
    assert shares[0] == 0.1
    assert shares[9] == shares[10] == 1
    assert shares[55] == pytest.approx(0.55)
    assert shares[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(shares[10:], shares[11:]))
    assert train.schedule(0, 10, 0, 0.0) == 1
    wsd = [train.schedule(step, 100, 10, 0.1, "wsd") for step in range(101)]
    assert wsd[:11] == shares[:11]
    assert wsd[10] == wsd[80] == 1
    assert wsd[90] == pytest.approx(0.55)
    assert wsd[100] == pytest.approx(0.1)


def packed_stream(attention="packed", n_docs=40, seq_len=16) -> Stream:
    """A stream of small documents, a third of whose chunks have thoughts."""
    rng = np.random.default_rng(1)

    def document() -> list[list[int]]:
        n_chunks = rng.integers(1, 4)
        return [rng.integers(0, 2, rng.integers(1, 9)).tolist() for _ in range(n_chunks)]

    corpus = corpus_of([document() for _ in range(n_docs)])
    spans = [[0, 1][: i % 3] for i in range(corpus.n_chunks)]
    rows = Rows(seq_len=seq_len, attention=attention)
    return Stream([corpus], [carried(spans)], TOY, rows)


def carried(spans: list[list[int]]) -> SimpleNamespace:
    """Thoughts in memory."""
    arrays = [np.array(z, dtype=np.int64) for z in spans]
    chunks = np.cumsum([0] + [len(z) for z in spans])
    return SimpleNamespace(tokens=np.concatenate(arrays), chunks=chunks, span=arrays.__getitem__)


def three_steps(optimizer: str, attention: str, groups: int) -> tuple[list, torch.Tensor]:
    """(losses, parameters afterwards) of three steps of 12 rows in so many micro-batches."""
    s = train.Settings(optimizer=optimizer, **SMALL)
    model = small_model(8)
    stream = packed_stream(attention)
    optimizers = train.make_optimizers(model, s)
    losses = []
    for i in range(3):
        batches = stream.micro_batches(12 * i, 12, groups, ALL)
        n_targets = stream.n_targets(12 * i, 12)
        loss, _ = train.train_step(model, optimizers, batches, n_targets, s, "cpu")
        losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("attention", ["padded", "packed", "document"])
def test_accumulation_changes_nothing(optimizer, attention):
    losses, params = three_steps(optimizer, attention, 1)
    accumulated_losses, accumulated_params = three_steps(optimizer, attention, 3)
    assert losses == pytest.approx(accumulated_losses, abs=1e-5)
    torch.testing.assert_close(params, accumulated_params, atol=1e-4, rtol=1e-3)


def test_recompute_changes_nothing():
    ids = torch.randint(0, 40, (3, 30), generator=torch.Generator().manual_seed(0))
    model = small_model()
    grads = []
    for recompute in (False, True):
        for layer in model.layers:
            layer.recompute = recompute
        model(ids[:, :-1], targets=ids[:, 1:]).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_document_attention_is_a_document_a_row():
    """Packed with attention within documents, the loss is that of each document by itself, but
    for EOS -> BOS between two."""
    model = small_model(8)
    # One row holds all documents, and starts again.
    stream = packed_stream("document", n_docs=9, seq_len=400)
    [batch] = stream.micro_batches(0, 1, 1, ALL)
    assert len(set(batch.documents[0].tolist())) > 9
    targets = torch.where(batch.targets != TOY.bos, batch.targets, -1)
    whole = model(batch.ids, targets=targets, documents=batch.documents).item()
    row = torch.cat((batch.ids[0], batch.targets[0, -1:]))
    cuts = [*(row == TOY.bos).nonzero()[:, 0].tolist(), len(row)]
    alone = 0
    for a, b in zip(cuts, cuts[1:]):
        if b - a > 1:
            alone += model(row[None, a : b - 1], targets=row[None, a + 1 : b]).item()
    assert whole == pytest.approx(alone, rel=1e-5)
    across_documents = model(batch.ids, targets=targets).item()
    assert across_documents != pytest.approx(alone, rel=1e-3)


# ---------------------------------------------------------------------------------- loss


def plain_loss(hidden, weight, targets):
    logits = (hidden @ weight.T).float()
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


@pytest.mark.parametrize("keep", [0, 1 << 30])  # logits computed again in the backward pass, or kept
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_loss_equals_the_plain_one(keep, dtype, monkeypatch):
    monkeypatch.setattr(kernels.HeadLoss, "KEEP", keep)
    pieces = {"cpu": 4 * 50 * 7}  # many pieces, the last one smaller
    monkeypatch.setattr(kernels.HeadLoss, "PIECE", pieces)
    torch.manual_seed(0)
    hidden = torch.randn(2, 25, 16, dtype=dtype)
    weight = torch.randn(99, 16, dtype=dtype)
    targets = torch.randint(0, 99, (2, 25))
    targets[0, 3:9] = -1

    def flat(loss):
        return lambda h, w, t: loss(h.flatten(0, 1), w, t.flatten())

    results = []
    for loss_of in (flat(kernels.HeadLoss.apply), kernels.head_loss, flat(plain_loss)):
        h = hidden.clone().requires_grad_()
        w = weight.clone().requires_grad_()
        loss = loss_of(h, w, targets)
        (0.125 * loss).backward()
        results.append((loss.detach(), h.grad.float(), w.grad.float()))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for got in results[:2]:
        for ours, reference in zip(got, results[2]):
            assert (ours - reference).abs().max() <= tolerance * reference.abs().max()


def test_head_loss_of_padding_only():
    h = torch.randn(1, 3, 8, requires_grad=True)
    w = torch.randn(5, 8, requires_grad=True)
    loss = kernels.head_loss(h, w, torch.full((1, 3), -1))
    loss.backward()
    assert loss == 0 and not h.grad.any() and not w.grad.any()


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def extra_megabytes(which: str, *flags: str) -> float:
    """What a loss of 8,192 tokens over 32,004 classes in bf16 takes above its inputs and
    gradients, measured in a process of its own."""
    done = script("tests/bench_loss.py", f"--which={which}", *flags, timeout=1800)
    return json.loads(done.stdout)["extra_MB"]


@linux
def test_head_loss_takes_little_memory():
    """The logits are as many as at full size; only the width is small. The bound of 300 MB
    tells our loss (65 MB) from the plain one (3,140 MB)."""
    assert extra_megabytes("ours", "--dim=16") <= 300
    assert extra_megabytes("plain", "--dim=16") > 2000


@pytest.mark.long
@linux
def test_head_loss_takes_little_memory_at_full_width():
    """Width 2048: up to 15 minutes on a CPU that has no bf16 instructions."""
    assert extra_megabytes("ours") <= 300


@pytest.mark.parametrize(
    "n_layer,n_embd,n_params",
    [(3, 128, 0.6e6), pytest.param(6, 256, 5e6, marks=pytest.mark.slow)],
)
def test_fifty_steps_equal_transformers(n_layer, n_embd, n_params, tmp_path):
    """Beside a plain loop with transformers' model and torch's AdamW, from the same weights, on
    the same batches."""
    transformers = pytest.importorskip("transformers")
    tok = make_tokenizer()
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": 8, "n_kv_head": 4, "seq_len": 64}
    recipe = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "clip": 1.0}
    s = train.Settings(**sizes, **recipe, rope_theta=1e4, max_steps=50)
    model = train.start_model(s, train.make_config(s, tok.n_vocab), None, None, "cpu")
    found = sum(p.numel() for p in model.parameters())
    assert found == pytest.approx(n_params, rel=0.2)
    model_folder.save_model(tmp_path, model, tok)
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference = load(tmp_path, dtype=torch.float32)
    plain = torch.optim.AdamW(
        reference.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01
    )
    optimizers = train.make_optimizers(model, s)
    rng = np.random.default_rng(0)
    for step in range(50):
        start = rng.integers(0, 200, (4, 1))
        stride = rng.integers(1, 4, (4, 1))
        ids = torch.from_numpy((start + np.arange(65) * stride) % 250)  # something to learn
        for group in (*optimizers[0].param_groups, *plain.param_groups):
            group["lr"] = 1e-3 * train.schedule(step, 50, 10, 0.0)
        batch = Batch(ids[:, :-1], ids[:, 1:], None)
        ours, norm = train.train_step(model, optimizers, [batch], 4 * 64, s, "cpu")
        logits = reference(batch.ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        theirs_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        plain.step()
        plain.zero_grad()
        assert ours.item() == pytest.approx(loss.item(), abs=1e-3), step
        assert norm.item() == pytest.approx(theirs_norm.item(), rel=0.02), step
    assert loss.item() < 2.5


def all_learned(ids) -> Document:
    return Document(np.array(ids), np.ones(len(ids), dtype=bool))


def test_loss_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tok = make_tokenizer()
    model = small_model(tok.n_vocab)
    texts = ("Start at 3.", "Add", "Multiply by 9. And again.")
    documents = [all_learned(tok.encode(text)) for text in texts]
    model_folder.save_model(tmp_path, model, tok)
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference = load(tmp_path, dtype=torch.float32)
    expected = 0
    for document in documents:
        ids = torch.tensor(document.ids[None])
        mean = reference(ids, labels=ids).loss.item()
        expected += mean * (ids.shape[1] - 1)
    ids, targets = pad(documents)
    assert model(ids, targets=targets).item() == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------- data


def padded_stream(n: int, **rows) -> Stream:
    corpus = corpus_of([[[0] * (i % 5 + 1), [1, i % 2]] for i in range(n)])
    spans = [z for i in range(n) for z in ([], [i % 2])]
    return Stream([corpus], [carried(spans)], TOY, Rows(**{"seq_len": 64} | rows))


def row_ids(stream: Stream, numbers) -> list[list[int]]:
    return [stream.padded_row(n).ids.tolist() for n in numbers]


def test_stream_covers_each_epoch_once_and_depends_on_the_position_only():
    data = padded_stream(50)
    first = row_ids(data, range(150))
    assert row_ids(padded_stream(50), (149, 3, 77)) == [first[149], first[3], first[77]]
    for epoch in range(3):
        assert sorted(data.epoch(epoch).doc) == list(range(50))
    assert first[:50] != first[50:100]
    assert row_ids(padded_stream(50, seed=1), (0, 1)) != first[:2]


def test_thoughts_only_leaves_documents_without_a_thought_out():
    """The stream is that of a corpus that holds the other documents alone, in lengths and epochs, too."""
    documents = [[[0] * (i % 5 + 1), [1, i % 2]] for i in range(30)]
    spans = [z for i in range(30) for z in ([], [1] * (i % 3))]
    having = [i for i in range(30) if i % 3]
    kept = Stream([corpus_of(documents)], [carried(spans)], TOY, Rows(seq_len=64, thoughts_only=True))
    alone = Stream(
        [corpus_of([documents[i] for i in having])],
        [carried([z for i in having for z in spans[2 * i : 2 * i + 2]])],
        TOY,
        Rows(seq_len=64),
    )
    assert kept.docs[0].tolist() == having
    assert (kept.mean_length(0), kept.takes) == (alone.mean_length(0), alone.takes)
    for epoch in range(3):
        assert sorted(kept.epoch(epoch).doc) == having
    # The coins differ, because a chunk's has its number in the corpus; the text does not.
    text, same = ([sorted(x for x in row if x < 2) for row in row_ids(s, range(60))] for s in (kept, alone))
    assert sorted(text) == sorted(same)
    assert [kept.row_length(n) for n in range(60)] == list(map(len, row_ids(kept, range(60))))
    assert Stream([corpus_of(documents)], [None], TOY, Rows(seq_len=64, thoughts_only=True)).takes == [30]
    with pytest.raises(UserError, match="no thought, so"):
        none = carried([[]] * 60)
        none.folder = "E1"
        Stream([corpus_of(documents)], [none], TOY, Rows(seq_len=64, thoughts_only=True))


def form_of(ids) -> int:
    """The form of a document's only thought."""
    if TOY.pri in ids:
        return PRIOR
    return POSTERIOR if TOY.pos in ids else RAW


def test_forms_are_fair_coins_drawn_anew_each_epoch():
    data = padded_stream(200)
    form = np.array([
        [form_of(data.document(0, doc, epoch).ids) for doc in range(200)] for epoch in range(20)
    ])  # fmt: skip
    assert abs((form == PRIOR).mean() - 0.5) < 0.03
    assert not (form == RAW).any()
    assert abs((form[0] == form[1]).mean() - 0.5) < 0.15


def test_completion_loss_is_of_what_answers_a_question():
    """--loss=completion: targets are the thought with its EOL, the answer and EOS. Questions and
    markers are read. The form is always the prior."""
    corpus = corpus_of([[[0, 1], [1, 1, 0]], [[1], [0]]], questions=[True, False, True, False])
    for thoughts in (carried([[], [0], [], []]), None):
        data = Stream([corpus], [thoughts], TOY, Rows(seq_len=64, completion=True))
        for row in range(4):
            ids, targets, _ = data.micro_batch([row])
            whole = [*ids[0].tolist(), int(targets[0, -1])]
            learned = [t for t in targets[0].tolist() if t >= 0]
            if whole[1:3] == [0, 1]:
                markers = [TOY.sol, TOY.pri] if thoughts else []
                answer = [*([0, TOY.eol] if thoughts else []), 1, 1, 0, TOY.eos]
                assert whole == [TOY.bos, 0, 1, *markers, *answer]
                assert learned == answer
            else:
                assert whole == [TOY.bos, 1, 0, TOY.eos]
                assert learned == [0, TOY.eos]
            assert data.n_targets(row, 1) == len(learned)
    ids, _, _ = data.micro_batch([0, 1])
    assert ids.min() >= 0  # what is padding or only read is an id, too


def asked(tmp_path, lengths: list[int]) -> str:
    """A folder with a document of a question and an answer for each length of a question."""
    documents = [[("7" * n, True), ("5", False)] for n in lengths]
    write_corpus(tmp_path / "C", documents, make_tokenizer(), {})
    return str(tmp_path / "C")


def test_answers_behind_long_questions_are_counted_and_no_step_fails(tmp_path, capsys):
    corpus = asked(tmp_path, [40] * 6 + [3, 29, 30])  # BOS, 30 tokens, then the answer is the 32nd
    flags = ["--loss=completion", "--seq_len=32", "--n_layer=1", "--n_embd=8", "--batch_size=1"]
    flags += ["--max_steps=9", f"--corpus={corpus}", f"--val_corpus={corpus}", "--val_every=4"]
    done = inside(train, *flags, f"--out_dir={tmp_path}/m")
    assert done.stdout.count("6 of 9 documents have no answer within --seq_len=32") == 2
    records = [json.loads(line) for line in open(tmp_path / "m/metrics.jsonl")]
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses.count(0) == 6 and all(math.isfinite(x) for x in losses)
    assert all(r["val_loss"] > 1 for r in records if "val_loss" in r)
    flags[1] = "--seq_len=8"
    done = inside(train, *flags, f"--corpus={asked(tmp_path, [40, 8])}", f"--out_dir={tmp_path}/no", code=1)
    assert "2 of 2 documents have no answer within --seq_len=8; raise it" in done.stderr
    assert not (tmp_path / "no").exists()


def test_all_parameters_decay():
    """As in the paper's code: norms and embeddings, too."""
    model = small_model()
    s = train.Settings(weight_decay=0.5, optimizer="adamw", lr=0.1)
    [optimizer] = train.make_optimizers(model, s)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * 0.95, msg=name)


def test_completion_loss_needs_questions(tmp_path, digits):
    flags = [f"--corpus={digits}/warm", "--loss=completion", "--attention=packed"]
    done = inside(train, *flags, f"--out_dir={tmp_path}/m", code=1)
    assert "--loss=completion: needs" in done.stderr


def test_bare_chunks():
    """--bare: that share of the chunks with a thought is written without it. The others stay fair
    coins, and lengths stay exact."""
    data = padded_stream(200, bare=0.3)
    forms = []
    for epoch in range(20):
        documents = [data.document(0, doc, epoch).ids for doc in range(200)]
        forms += [form_of(ids) for ids in documents]
        assert data.lengths(0, epoch).tolist() == [len(ids) for ids in documents]
    shares = np.bincount(forms) / len(forms)  # RAW, PRIOR, POSTERIOR
    assert shares == pytest.approx([0.3, 0.35, 0.35], abs=0.03)


def test_lengths_are_exact_and_so_is_their_mean_on_average():
    data = padded_stream(300)
    found = []
    for epoch in range(10):
        lengths = [len(data.document(0, doc, epoch).ids) for doc in range(300)]
        assert data.lengths(0, epoch).tolist() == lengths
        found += lengths
    assert data.mean_length(0) == pytest.approx(np.mean(found), rel=0.01)


def test_long_documents_are_cut_and_counted():
    whole = row_ids(padded_stream(10), range(25))
    data = padded_stream(10, seq_len=6)
    assert row_ids(data, range(25)) == [ids[:6] for ids in whole]
    assert data.cut_tokens(25) == sum(max(0, len(ids) - 6) for ids in whole) > 0


@pytest.mark.parametrize("attention", ["packed", "document"])
def test_packed_rows_are_the_documents_end_to_end(attention):
    data = packed_stream(attention)
    tokens = []
    for number in range(3):
        epoch = data.epoch(number)
        for place in zip(epoch.source, epoch.doc, epoch.turn):
            tokens += data.make_document(*place).ids.tolist()
    n = len(tokens) // 16 - 1
    [batch] = packed_stream(attention).micro_batches(0, n, 1, ALL)
    assert batch.ids.flatten().tolist() == tokens[: n * 16]
    assert batch.targets.flatten().tolist() == tokens[1 : n * 16 + 1]
    # A stream that has not read what is before gives the same rows.
    [late] = packed_stream(attention).micro_batches(n - 2, 2, 1, ALL)
    assert torch.equal(late.ids, batch.ids[-2:])
    if attention == "document":
        for ids, documents in zip(batch.ids, batch.documents):
            new = documents[1:] != documents[:-1]
            assert torch.equal(new, ids[1:] == TOY.bos)


def counted_rows(batches: list[Batch]) -> list[list[int]]:
    """The rows of batches without their padding, sorted."""
    rows = [row for batch in batches for row in zip(batch.ids, batch.targets)]
    return sorted(ids[targets >= 0].tolist() for ids, targets in rows)


@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_ranks_and_micro_batches_only_divide_the_stream(attention):
    whole = packed_stream(attention).micro_batches(24, 12, 1, ALL)
    for n_ranks, micro_steps in ((2, 1), (4, 3), (3, 2)):
        groups = n_ranks * micro_steps
        batches = []
        for rank in range(n_ranks):
            stream = packed_stream(attention)
            part = stream.micro_batches(24, 12, groups, slice(rank, None, n_ranks))
            assert len(part) == micro_steps
            batches += part
        assert counted_rows(batches) == counted_rows(whole)


def test_mixing_follows_the_weights_and_covers_every_corpus():
    corpora = [
        corpus_of([[[0] * 9] for _ in range(300)]),
        corpus_of([[[1] * 19] for _ in range(50)]),
    ]
    packed = Rows(seq_len=32, attention="packed")
    data = Stream(corpora, [None, None], TOY, packed, weights=[0.25, 0.75])
    rows = np.concatenate([data.packed_row(n)[0][1:] for n in range(400)])
    share = (rows == 1).sum() / np.isin(rows, (0, 1)).sum()
    ones, zeros = 0.75 * 19 / 21, 0.25 * 9 / 11  # weights count BOS and EOS, too
    assert share == pytest.approx(ones / (ones + zeros), abs=0.02)
    epochs = [data.epoch(number) for number in range(40)]
    seen = np.concatenate([epoch.doc[epoch.source == 0] for epoch in epochs])
    counts = np.bincount(seen, minlength=300)
    assert counts.max() - counts.min() <= 1
    for epoch in epochs:
        assert (np.bincount(epoch.doc[epoch.source == 1], minlength=50) == 1).all()
    changes = (np.diff(data.epoch(0).source) != 0).sum()
    assert changes > 10  # shuffled together, not one after the other
    by_size = Stream(corpora, [None, None], TOY, packed)
    assert by_size.takes == [300, 50]


# --------------------------------------------------------------------------- the command

QUICK = ["--n_layer=2", "--n_embd=32", "--batch_size=8", "--max_steps=60", "--save_every=5"]


def flags_of(digits, out, *flags) -> list[str]:
    data = [f"--corpus={digits}/warm", f"--thoughts={digits}/warm_thoughts"]
    return [*data, f"--out_dir={out}", *QUICK, *flags]


def run_train(digits, out, *flags, code=0):
    """train.py in this process."""
    return inside(train, *flags_of(digits, out, *flags), code=code)


def command(digits, out, *flags) -> list[str]:
    """train.py in a process of its own, to be killed."""
    return [sys.executable, str(ROOT / "train.py"), *flags_of(digits, out, *flags)]


def model_bytes(out) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_learns_and_reports(digits, tmp_path):
    out = tmp_path / "model"
    heldout = [f"--val_corpus={digits}/heldout", f"--val_thoughts={digits}/heldout_truth"]
    flags = [*heldout, "--val_every=30"]
    run_train(digits, out, *flags)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    validation = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    assert len(validation) == 2
    assert validation[1] < validation[0] < 6
    report = json.loads((out / "training.json").read_text())
    corpus = open_corpus(digits / "warm")
    assert report["steps"] == 60
    assert report["train_tokens"] > 60 * 8 * len(corpus.tokens) / corpus.n_docs
    assert not list(out.glob("*.tmp")) and not (out / "checkpoints").exists()
    assert "complete" in run_train(digits, out, *flags).stdout
    assert "--lr=0.01 became 0.5" in run_train(digits, out, "--lr=0.5", code=1).stderr


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_plan_is_what_a_model_takes(optimizer):
    sizes = {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_kv_head": 2, "seq_len": 128}
    s = train.Settings(**sizes, batch_size=4, optimizer=optimizer, attention="packed")
    c = train.make_config(s, 1000)
    model = train.start_model(s, c, None, None, "cpu")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # bytes that autograd keeps, by address
    held = []  # the tensors themselves, so that no address is used twice

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(t)
        return t

    ids = torch.randint(0, 1000, (4, 129))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(ids[:, :-1], targets=ids[:, 1:])
    loss.backward()
    parts = plan.memory(c, s, 1, 4, 1)
    n = sum(p.numel() for p in model.parameters())
    state = 0
    for o in train.make_optimizers(model, s):
        tensors = [v for values in o.state.values() for v in values.values()]
        state += sum(v.numel() for v in tensors if v.ndim)
    assert parts["weights"] == parts["gradients"] == 4 * n
    assert n == sum(p.grad.numel() for p in model.parameters())
    assert parts["optimiser"] == 4 * state and parts["their copies for computing"] == 0
    logits = 4 * 512 * 1000
    assert sum(kept.values()) == pytest.approx(parts["activations"] + logits, rel=0.25)
    s.recompute = True
    assert plan.memory(c, s, 1, 4, 1)["activations"] < 0.5 * parts["activations"]
    assert plan.memory(c, s, 8, 4, 2)["weights"] == parts["weights"] / 8


def test_flops_by_hand():
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "n_hidden": 80}
    s = train.Settings(**sizes, tie_embeddings=False)
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 80 + 2 * 32
    n = 3 * block + 32 + 500 * 32
    flops = plan.flops_per_token(train.make_config(s, 500), 100)
    assert flops == 6 * n + 12 * 3 * 32 * 100


def test_plan_prints_and_writes_nothing(digits, tmp_path, capsys):
    out = run_train(digits, tmp_path / "m", "--plan=here").stdout
    for word in ("parameters", "weights", "gradients", "optimiser", "activations", "logits"):
        assert word in out
    for word in ("FLOPs", "epochs", "of thoughts"):
        assert word in out
    assert not (tmp_path / "m").exists()
    out = script("train.py", "--preset=tinyllama-1.1b", "--plan=8xH100").stdout
    assert "1,100,064,768" in out and "33,060, 12,999,720,960 tokens" in out and "8 x H100" in out
    assert "hours at 40% of 989 TFLOP/s" in out
    big = train.PRESETS["tinyllama-1.1b"]
    with pytest.raises(UserError, match="lower --micro_batch"):
        train.main(train.Settings(**big, plan="3090"))
    with pytest.raises(UserError, match="or a number and one of"):
        train.main(train.Settings(**big, plan="8xabacus"))


def test_token_budget(digits, tmp_path):
    flags = [f"--corpus={digits}/raw", f"--out_dir={tmp_path}/m", *QUICK, "--max_tokens=5000"]
    inside(train, *flags)
    report = json.loads((tmp_path / "m/training.json").read_text())
    assert report["train_tokens"] == pytest.approx(5000, rel=0.05)


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(digits, out), check=True, capture_output=True)
    return out


def newest_checkpoint(out) -> str:
    return max((path.name for path in checkpoint.checkpoints(out)), default="")


SIGINT = pytest.param(signal.SIGINT, marks=pytest.mark.slow)  # what SIGTERM does


@pytest.mark.parametrize("how", [signal.SIGKILL, SIGINT, signal.SIGTERM])
def test_killed_runs_end_in_the_same_weights(digits, undisturbed, tmp_path, how):
    out = tmp_path / "killed"
    for n in (1, 2):  # kill after the first checkpoints of each run
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        child = subprocess.Popen(command(digits, out), **pipes)
        before = newest_checkpoint(out)
        deadline = time.time() + 60
        while newest_checkpoint(out) == before and time.time() < deadline and child.poll() is None:
            time.sleep(0.005)
        child.send_signal(how)
        _, err = child.communicate(timeout=60)
        assert not (out / "config.json").exists(), n
        if how == signal.SIGKILL:
            assert child.returncode == -how
        else:
            assert child.returncode == 128 + how
            assert "interrupted; saved step" in err and "Traceback" not in err
    done = run_train(digits, out)
    assert "from step 0" not in done.stdout and not (out / "checkpoints").exists()
    assert model_bytes(out) == model_bytes(undisturbed)


def interrupted(digits, out) -> None:
    """A run that was stopped behind its third checkpoint."""
    child = subprocess.Popen(command(digits, out), stderr=subprocess.PIPE, text=True)
    while newest_checkpoint(out) < "00000015" and child.poll() is None:
        time.sleep(0.005)
    child.terminate()
    assert child.wait(60) == 128 + signal.SIGTERM


def test_only_the_newest_checkpoints_are_kept_and_a_damaged_one_is_named(digits, tmp_path):
    interrupted(digits, tmp_path / "m")
    kept = sorted((tmp_path / "m/checkpoints").iterdir())
    assert len(kept) == 2 and kept[0].name >= "00000010"
    for file in kept[1].glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    done = run_train(digits, tmp_path / "m", code=1)
    assert f"{kept[1]}: damaged" in done.stderr and done.stderr.count("\n") == 1
    shutil.rmtree(kept[1])
    assert f"from step {int(kept[0].name)}" in run_train(digits, tmp_path / "m").stdout


def test_how_the_work_is_done_may_change_on_resume_but_not_what_comes_out(
    digits, undisturbed, tmp_path
):
    interrupted(digits, tmp_path / "m")
    other = run_train(digits, tmp_path / "m", "--seed=1", code=1)
    assert "--seed=0 became 1" in other.stderr
    run_train(digits, tmp_path / "m", "--micro_batch=3", "--recompute")
    a = read_safetensors(tmp_path / "m/model.safetensors")
    b = read_safetensors(undisturbed / "model.safetensors")
    assert all((a[name] - b[name]).abs().max() < 0.02 for name in a)


def test_a_full_disk_and_a_folder_that_cannot_be_written_end_in_one_line(digits, tmp_path):
    import resource

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    full = command(digits, tmp_path / "full")
    limits = {"preexec_fn": small_files, "timeout": 120}
    done = subprocess.run(full, capture_output=True, text=True, **limits)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "full/checkpoints/00000005" in done.stderr and "File too large" in done.stderr
    assert not newest_checkpoint(tmp_path / "full")
    (tmp_path / "file").write_text("")
    done = run_train(digits, tmp_path / "file/m", code=1)
    assert done.stderr.count("\n") == 1 and str(tmp_path / "file") in done.stderr


@pytest.mark.long
def test_thirty_kills_at_random_moments(digits, tmp_path):
    """SIGKILL whenever it comes: every checkpoint under a final name can be read, and the weights
    end up as in an undisturbed run."""
    flags = ["--max_steps=200", "--save_every=10", "--attention=packed", "--seq_len=64"]
    script("train.py", *flags_of(digits, tmp_path / "whole", *flags))
    expected = model_bytes(tmp_path / "whole")
    settings = train.Settings(n_layer=2, n_embd=32, seq_len=64)
    n_vocab = open_corpus(digits / "warm").tokenizer.n_vocab
    config = train.make_config(settings, n_vocab)
    model = train.start_model(settings, config, None, None, "cpu")
    optimizers = train.make_optimizers(model, settings)
    rng = random.Random(0)
    seen = set()
    kills = 0
    runs = 0
    while kills < 30:
        out = tmp_path / f"killed{runs}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        child = subprocess.Popen(command(digits, out, *flags), **pipes)
        try:
            child.wait(rng.uniform(0.5, 6))
            assert child.returncode == 0, child.communicate()
            assert model_bytes(out) == expected
            runs += 1
            continue
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            kills += 1
        for path in checkpoint.checkpoints(out):  # each, not only the newest
            seen.add(path.name)
            single = tmp_path / "single"
            shutil.rmtree(single, ignore_errors=True)
            shutil.copytree(path, single / "checkpoints" / path.name)
            position = checkpoint.load_checkpoint(single, model, optimizers)
            assert position.step == int(path.name)
    out = tmp_path / f"killed{runs}"
    script("train.py", *flags_of(digits, out, *flags))
    assert model_bytes(out) == expected
    print(f"{kills} kills in {runs + 1} runs, {len(seen)} different checkpoints read")


def test_a_model_of_somebody_else_is_not_taken_for_a_finished_run(digits, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "did not make" in run_train(digits, tmp_path, code=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_exploding_loss_is_refused(digits, tmp_path):
    flags = ["--lr=1e30", "--optimizer=adamw", "--clip=0"]
    done = run_train(digits, tmp_path / "m", *flags, code=1)
    assert "lower --lr" in done.stderr and not (tmp_path / "m/config.json").exists()


def test_other_tokenizer_is_refused(digits, tmp_path):
    small = ["--warm=5", "--raw=5", "--heldout=5", "--n_vocab=256"]
    inside(digits_command, f"--out_dir={tmp_path}/other", *small)
    flags = [f"--corpus={digits}/warm", f"--val_corpus={tmp_path}/other/heldout"]
    done = inside(train, *flags, f"--out_dir={tmp_path}/m", *QUICK, code=1)
    assert "another tokenizer" in done.stderr


@pytest.mark.parametrize("device,dtype,seconds,said", [
    ("cpu", "bfloat16", (1.0, 7.0), "7 times as long in bfloat16; give --dtype=float32"),
    ("cpu", "bfloat16", (1.0, 1.5), ""),
    ("cpu", "float32", (), ""),
    ("cuda", "bfloat16", (), ""),
])  # fmt: skip
def test_a_cpu_that_is_slow_in_bfloat16_is_told(device, dtype, seconds, said, monkeypatch, capsys):
    times = iter(seconds)
    monkeypatch.setattr(kernels.timeit, "repeat", lambda function, number: [next(times), 9.0])
    kernels.warn_of_slow_bfloat16(device, dtype)
    err = capsys.readouterr().err
    assert said in err and bool(said) == bool(err) and not list(times)
