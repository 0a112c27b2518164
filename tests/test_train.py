"""The model against transformers, weights on disk, the optimisers, the data stream, and exact resume."""

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
from data.cli import UserError
from data.corpus import POSTERIOR, PRIOR, open_corpus
from data.tokenizer import make_tokenizer

SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "seq_len": 64}


def small_model(n_vocab=40, seed=0, **change):
    s = train.Settings(corpus="", out_dir="", **(SMALL | change))
    model = train.Llama(train.make_config(s, n_vocab))
    model.init_weights(seed)
    return model.eval()


@pytest.mark.parametrize("change", [{}, {"tie_embeddings": False}, {"n_kv_head": 1}, {"n_kv_head": 4, "rope_theta": 10000.0}])
def test_model_folder_opens_in_transformers_with_equal_logits(change, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok = make_tokenizer()
    model = small_model(tok.n_vocab, **change)
    train.save_model(tmp_path, model, tok)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, tok.n_vocab, (3, 50))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(ids)), reference(ids).logits, atol=1e-4, rtol=1e-4)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("Add 8. é", add_special_tokens=False) == tok.encode("Add 8. é") and theirs.eos_token_id == tok.eos


@pytest.mark.parametrize("tie", [True, False])
def test_model_folder_round_trip(tie, tmp_path):
    model = small_model(make_tokenizer().n_vocab, tie_embeddings=tie)
    train.save_model(tmp_path, model, make_tokenizer())
    again, tok = train.load_model(tmp_path)
    assert again.config == model.config and tok.n_vocab == model.config.n_vocab
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert (again.lm_head.weight is again.embed_tokens.weight) == tie


def edit_config(folder, **change):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder, f):
    path = folder / "model.safetensors"
    path.write_bytes(f(path.read_bytes()))


DAMAGES = {
    "no config": lambda f: (f / "config.json").unlink(),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "empty weights": lambda f: edit_weights(f, lambda b: b""),
    "weights cut off": lambda f: edit_weights(f, lambda b: b[:-4]),
    "weights too long": lambda f: edit_weights(f, lambda b: b + b"abcd"),
    "header longer than the file": lambda f: edit_weights(f, lambda b: (2**60).to_bytes(8, "little") + b[8:]),
    "header is not JSON": lambda f: edit_weights(f, lambda b: b[:8] + b"?" + b[9:]),
    "other dtype": lambda f: edit_weights(f, lambda b: b.replace(b'"F32"', b'"F16"', 1)),
    "tensor renamed": lambda f: edit_weights(f, lambda b: b.replace(b"model.norm", b"model.nurm", 1)),
    "NaN weights": lambda f: edit_weights(f, lambda b: b[:-4] + np.float32("nan").tobytes()),
    "other architecture": lambda f: edit_config(f, model_type="mamba"),
    "attention bias": lambda f: edit_config(f, attention_bias=True),
    "other width": lambda f: edit_config(f, hidden_size=48),
    "negative width": lambda f: edit_config(f, hidden_size=-1),
    "no width": lambda f: edit_config(f, hidden_size=None),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model_folders_are_refused_by_name(damage, tmp_path):
    train.save_model(tmp_path, small_model(make_tokenizer().n_vocab), make_tokenizer())
    train.load_model(tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises(UserError) as e:
        train.load_model(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------- optimisers


def test_newton_schulz_orthogonalises():
    for shape in ((3, 20, 50), (2, 50, 20), (1, 16, 16)):
        x = train.newton_schulz(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        singular = torch.linalg.svdvals(x)
        assert x.shape == shape and 0.3 < singular.min() and singular.max() < 1.3
    g = torch.randn(1, 12, 30)
    u, _, v = torch.linalg.svd(g[0], full_matrices=False)
    assert torch.nn.functional.cosine_similarity(train.newton_schulz(g)[0].flatten(), (u @ v).flatten(), dim=0) > 0.95


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
        s = train.Settings(corpus="", out_dir="", optimizer=kind, **SMALL)
        groups = [p for o in train.make_optimizers(model, s) for g in o.param_groups for p in g["params"]]
        assert len(groups) == len(set(map(id, groups))) == len(list(model.parameters())) and len(train.make_optimizers(model, s)) == n


def test_schedule():
    shares = [train.schedule(step, 100, 10, 0.1) for step in range(101)]
    assert shares[0] == 0.1 and shares[9] == shares[10] == 1 and shares[55] == pytest.approx(0.55) and shares[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(shares[10:], shares[11:])) and train.schedule(0, 10, 0, 0.0) == 1


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulation_changes_nothing(optimizer):
    rng = np.random.default_rng(0)
    sequences = sorted((rng.integers(0, 40, rng.integers(3, 30)) for _ in range(10)), key=len)
    after = []
    for accumulate in (1, 3):
        s = train.Settings(corpus="", out_dir="", accumulate=accumulate, optimizer=optimizer, **SMALL)
        model = small_model()
        optimizers = train.make_optimizers(model, s)
        losses = [train.train_step(model, optimizers, sequences, s, "cpu")[0] for _ in range(3)]
        after.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert after[0][0] == pytest.approx(after[1][0], abs=1e-5)
    torch.testing.assert_close(after[0][1], after[1][1], atol=1e-4, rtol=1e-3)


def test_loss_equals_transformers():
    transformers = pytest.importorskip("transformers")
    import tempfile

    tok = make_tokenizer()
    model = small_model(tok.n_vocab)
    sequences = [np.array(tok.encode(text)) for text in ("Start at 3.", "Add", "Multiply by 9. And again.")]
    with tempfile.TemporaryDirectory() as folder:
        train.save_model(folder, model, tok)
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = sum(reference(torch.tensor(ids[None]), labels=torch.tensor(ids[None])).loss.item() * (len(ids) - 1) for ids in sequences)
    assert train.loss_sum(model, *train.pad(sequences, "cpu")).item() == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- data


def documents_of(n: int, seed=0):
    corpus = corpus_of([[[0] * (i % 5 + 1), [1, i % 2]] for i in range(n)])
    spans = [z for i in range(n) for z in ([], [i % 2])]

    class Carried:
        tokens, chunks = np.concatenate(spans), np.cumsum([0] + [len(z) for z in spans])
        span = staticmethod(lambda i: spans[i])

    return train.Documents(corpus, Carried, TOY, 64, seed)


def test_stream_covers_each_epoch_once_and_depends_on_the_position_only():
    data = documents_of(50)
    first = [data.at(i).tolist() for i in range(150)]
    assert [documents_of(50).at(i).tolist() for i in (149, 3, 77)] == [first[149], first[3], first[77]]
    for epoch in range(3):
        data.at(epoch * 50)
        assert sorted(data.order) == list(range(50))
    assert first[:50] != first[50:100] and documents_of(50, seed=1).at(0).tolist() + documents_of(50, seed=1).at(1).tolist() != first[0] + first[1]


def test_forms_are_fair_coins_drawn_anew_each_epoch():
    data = documents_of(200)
    form = np.array([[PRIOR if TOY.pri in data.sequence(doc, epoch) else POSTERIOR for doc in range(200)] for epoch in range(20)])
    share = (form == PRIOR).mean()
    assert abs(share - 0.5) < 0.03 and abs((form[0] == form[1]).mean() - 0.5) < 0.15


def test_mean_length_is_exact_on_average():
    data = documents_of(300)
    lengths = [len(data.sequence(doc, epoch)) for doc in range(300) for epoch in range(10)]
    assert data.mean_length() == pytest.approx(np.mean(lengths), rel=0.01)


def test_long_documents_are_cut_and_counted():
    data = documents_of(10)
    whole = data.sequence(4, 0)
    data.seq_len = 6
    assert data.sequence(4, 0).tolist() == whole[:6].tolist() and data.cut_tokens == len(whole) - 6


# --------------------------------------------------------------------------------------------- the command

QUICK = ["--n_layer=2", "--n_embd=32", "--batch_size=8", "--steps=60", "--save_every=5", "--log_every=5"]


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
    assert "--lr=0.004 became 0.5" in script("train.py", *run_train(digits, out, "--lr=0.5"), code=1).stderr


def test_token_budget(digits, tmp_path):
    script("train.py", f"--corpus={digits}/raw", f"--out_dir={tmp_path}/m", *QUICK, "--max_tokens=5000")
    assert json.loads((tmp_path / "m/training.json").read_text())["train_tokens"] == pytest.approx(5000, rel=0.05)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_runs_end_in_the_same_weights(digits, tmp_path, how):
    script("train.py", *run_train(digits, tmp_path / "whole"))
    command = [sys.executable, str(ROOT / "train.py"), *run_train(digits, tmp_path / "killed")]
    for n in (1, 2):  # kill after the first checkpoints of each run
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        path, deadline = tmp_path / "killed/checkpoint.pt", time.time() + 60
        before = path.stat().st_mtime_ns if path.exists() else 0
        while (not path.exists() or path.stat().st_mtime_ns == before) and time.time() < deadline and child.poll() is None:
            time.sleep(0.005)
        child.send_signal(how)
        _, err = child.communicate(timeout=60)
        assert child.returncode != 0 and not (tmp_path / "killed/config.json").exists(), n
        assert how == signal.SIGKILL or ("interrupted" in err and "Traceback" not in err)
    done = script("train.py", *run_train(digits, tmp_path / "killed"))
    assert "from step 0," not in done.stdout
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "killed/model.safetensors").read_bytes()


def test_a_damaged_checkpoint_is_named(digits, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "checkpoint.pt: damaged" in script("train.py", *run_train(digits, tmp_path / "m"), code=1).stderr


def test_exploding_loss_is_refused(digits, tmp_path):
    done = script("train.py", *run_train(digits, tmp_path / "m", "--lr=1e30", "--optimizer=adamw", "--clip=0"), code=1)
    assert "lower --lr" in done.stderr and not (tmp_path / "m/config.json").exists()


def test_other_tokenizer_is_refused(digits, tmp_path):
    script("data/digits.py", f"--out_dir={tmp_path}/other", "--warm=5", "--raw=5", "--heldout=5", "--n_vocab=256")
    flags = [f"--corpus={digits}/warm", f"--val_corpus={tmp_path}/other/heldout", f"--out_dir={tmp_path}/m", *QUICK]
    assert "another tokenizer" in script("train.py", *flags, code=1).stderr
