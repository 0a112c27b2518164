"""The engine against the slow reference that stands beside it in infer_thoughts.py.

The same tokens and the same log-probabilities, whatever the batch.
"""

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, TOY, corpus_of

import infer_thoughts
import train
from data.lib import engine as engine_module
from data.lib.cli import UserError
from data.lib.corpus import hash_state, hash_uniform
from data.lib.drawing import draw, keyed_uniform, nucleus
from data.lib.engine import Engine, Layout, Runner, Sampling, Scheduler
from infer_thoughts import EStep, Limits, infer, sample_slowly, score_slowly


def random_model(**sizes) -> train.Llama:
    """An untrained model whose probabilities are far from even."""
    c = (
        dict(n_vocab=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, head_dim=8, seq_len=128)
        | sizes
    )
    model = train.build(train.Config(**c), "cpu")
    train.init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.data = p.data * (4 if p.ndim == 2 and "embed" not in name else 1)
            if "bias" in name or "norm" in name:
                p.data = (1 if "norm" in name else 0) + 0.3 * torch.randn(p.shape, generator=generator)
    return model.to(getattr(torch, model.config.dtype)).eval()


def prompts_of(n: int, longest: int = 20, n_vocab: int = 50) -> list:
    rng = np.random.default_rng(0)
    return [rng.integers(0, n_vocab, rng.integers(1, longest)) for _ in range(n)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "multi-query", "tied", "bias"])
def test_every_family_samples_and_scores_as_the_slow_reference(family):
    model = random_model(
        **{
            "llama": {},
            "qwen2": {"model_type": "qwen2"},
            "qwen3": {"model_type": "qwen3"},
            "multi-query": {"n_kv_head": 1},
            "tied": {"tie_embeddings": True},
            "bias": {"attention_bias": True},
        }[family]
    )
    prompts = prompts_of(7)
    slow = [
        [sample_slowly(model, p, Sampling(12, frozenset({3, 4}), 5), i, k) for k in range(3)]
        for i, p in enumerate(prompts)
    ]
    engine = Engine(model)
    for mine, theirs in zip(
        engine.generate(prompts, np.arange(7), 3, Sampling(12, frozenset({3, 4}), 5)), slow
    ):
        for (ids, finished, log_q), (slow_ids, slow_finished, slow_log_q) in zip(mine, theirs):
            assert (
                ids.tolist() == slow_ids
                and finished == slow_finished
                and log_q == pytest.approx(slow_log_q, abs=1e-3)
            )
    tails = [[ids for ids, _, _ in row] + [np.zeros(0, np.int64)] for row in slow]
    for p, row, found in zip(prompts, slow, engine.score(prompts, tails)):
        assert [len(x) for x in found] == [len(ids) for ids, _, _ in row] + [0]
        assert [x.sum() for x in found] == pytest.approx([q for _, _, q in row] + [0], abs=1e-4)
        assert found[0].sum() == pytest.approx(
            score_slowly(model, [*p, *row[0][0]], len(p), len(p) + len(row[0][0])), abs=1e-4
        )


@pytest.mark.parametrize(
    "n_rows,steps_per_sync,prefill_tokens,K,static_shapes",
    [
        (4, 1, 2048, 1, False),
        (8, 1, 5, 4, False),
        (1024, 3, 7, 4, False),
        (12, 2, 1, 9, False),
        (1024, 1, 2048, 40, False),
        (1024, 8, 16, 4, True),
        (8, 3, 2048, 6, True),
    ],
)
def test_samples_do_not_depend_on_how_the_work_is_laid_out(
    n_rows, steps_per_sync, prefill_tokens, K, static_shapes
):
    """Always the same tokens: with few lanes or many; several steps before the host looks; prompts in
    chunks; more samples than lanes; sizes rounded up with ended lanes, as on a GPU."""
    model, prompts = random_model(), prompts_of(12)
    keys, sampling = np.arange(100, 112), Sampling(10, frozenset({3, 4}))
    plain = Engine(model).generate(prompts, keys, K, sampling)
    engine = Engine(model, n_rows, steps_per_sync)
    engine.PREFILL_TOKENS, engine.runner.static_shapes = prefill_tokens, static_shapes
    counted = []
    laid = engine.generate(prompts, keys, K, sampling, counted.append)
    again = engine.generate(
        prompts[3:5], keys[3:5], K, sampling
    )  # the cache is used again, with what the first call left in it
    for a, b in [*zip(plain, laid), *zip(plain[3:5], again)]:
        assert [(ids.tolist(), done) for ids, done, _ in a] == [(ids.tolist(), done) for ids, done, _ in b]
        assert [q for _, _, q in a] == pytest.approx([q for _, _, q in b], abs=1e-4)
    assert sum(counted) == sum(len(ids) for row in plain for ids, _, _ in row)


def test_bf16_weights_with_fp32_logits():
    model = random_model(dtype="bfloat16")
    prompts, engine = prompts_of(6), Engine(model)
    assert engine.runner.logits(torch.zeros(2, 32, dtype=torch.bfloat16)).dtype == torch.float32
    for p, row in zip(prompts, engine.generate(prompts, np.arange(6), 2, Sampling(10, frozenset({3})))):
        for ids, _, log_q in row:
            assert log_q == pytest.approx(
                score_slowly(model, [*p, *ids], len(p), len(p) + len(ids)),
                abs=infer_thoughts.TOLERANCE["bfloat16"] * len(ids),
            )


@pytest.mark.parametrize("n_vocab", [5, 36, 308, 1001])
def test_draw_inverts_the_cumulated_probabilities(n_vocab):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(500, n_vocab, generator=generator)
    logits[:, 1] = -200  # no mass in fp32
    uniform = torch.rand(500, generator=generator, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    tokens, log_p = draw(logits, uniform)
    exact = torch.log_softmax(logits.double(), -1)
    upto = exact.exp().cumsum(-1)
    here = torch.arange(500)
    slack = 1e-6  # masses are fp32
    assert (upto[here, tokens] > uniform - slack).all() and (
        upto[here, tokens] - exact.exp()[here, tokens] <= uniform + slack
    ).all()
    torch.testing.assert_close(log_p, exact[here, tokens], atol=1e-5, rtol=0)
    assert (tokens != 1).all() and draw(logits, uniform, 0.0)[0].equal(logits.argmax(-1))


def test_noise_on_the_device_is_hash_uniform():
    keys, position = np.arange(1000) * 7919, np.arange(1000) % 13
    state = torch.from_numpy(hash_state(1, 2, keys).astype(np.int64))
    assert np.array_equal(
        keyed_uniform(state, torch.from_numpy(position)).numpy(), hash_uniform(1, 2, keys, position)
    )


def test_memory_is_planned_and_refused_in_one_line(monkeypatch):
    engine = Engine(random_model())
    slots, cells, planned, _ = engine.plan(4, 100, 50, n_prompts=1000)
    assert (slots, cells) == (256, 4) and engine.plan(64, 100, 50, n_prompts=1)[:2] == (1, 64)
    each = engine.slot_bytes(4, 100, 50)
    free = int(
        (planned - (slots + 1) * each + 100.5 * each) / 0.8
    )  # 80% of it may be used: room for 100 slots, one of them for padding
    monkeypatch.setattr(engine_module, "free_memory", lambda device: free)
    fewer, _, less, _ = engine.plan(4, 100, 50, n_prompts=1000)
    assert fewer == 99 and less <= 0.8 * free
    engine.reserve(4, 100, 50, 1000)
    assert (
        engine.runner.layout == Layout(100, 100, 50, 4)
        and sum(x.nbytes for x in (engine.runner.prompts, engine.runner.own)) < 100 * each
    )
    monkeypatch.setattr(engine_module, "free_memory", lambda device: 1 << 20)
    with pytest.raises(
        UserError, match="one prompt of 100 tokens with 4 samples of 50 needs .* lower --max_new"
    ):
        engine.plan(4, 100, 50, n_prompts=1000)


def test_greedy_and_stop_sets(toy_model):
    prompts = prompts_of(9, n_vocab=8)
    for stop in ({TOY.eol}, {TOY.eol, 0, 1}, {7}):
        for p, [(ids, done, _)] in zip(
            prompts,
            Engine(toy_model).generate(
                prompts, np.arange(9), 1, Sampling(9, frozenset(stop), temperature=0.0)
            ),
        ):
            expected = list(p)
            while len(expected) < len(p) + 9 and (len(expected) == len(p) or expected[-1] not in stop):
                expected.append(int(toy_model.logits(toy_model(torch.tensor([expected])))[0, -1].argmax()))
            assert ids.tolist() == expected[len(p) :] and done == (ids[-1] in stop)


def test_a_wrong_engine_stops_the_run(toy_model, monkeypatch, tmp_path):
    """The comparison with the slow function is not for show."""
    corpus = corpus_of([[[0, 1], [1, 0, 1]]] * 5)
    numbers = np.flatnonzero(np.arange(10) % 2)
    e_step = EStep(Limits(3, 4, 64), samples=4)
    got = infer(Engine(toy_model), corpus, numbers, e_step)
    assert (infer_thoughts.check(toy_model, corpus, numbers, got, e_step, {}) < 1e-5).all()
    s = infer_thoughts.Settings(corpus="", model="", out_dir="", max_new=4)
    corpus.tokenizer = type("Tok", (), vars(TOY) | {"decode": staticmethod(lambda ids, first=True: str(ids))})
    fast = engine_module.draw
    monkeypatch.setattr(engine_module, "draw", lambda *a: (lambda t, p: (t, p + 0.01))(*fast(*a)))
    with pytest.raises(UserError, match="differs from the slow function by 0.01 nats a token"):
        infer_thoughts.run_part(tmp_path / "000000.npz", numbers, Engine(toy_model), corpus, s, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype,error", [("float32", 5e-4), ("bfloat16", 0.06)])
def test_an_error_at_every_token_is_no_rounding(monkeypatch, tmp_path, dtype, error):
    """Rounding passes both rules. An error that is alike at each token passes that of nats a token only."""
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, head_dim=8, seq_len=128)
    model = train.build(train.Config(n_vocab=30, **sizes), "cpu")
    train.init_weights(model, 0)
    model = model.to(getattr(torch, dtype)).eval()
    model.config.dtype = dtype
    corpus, numbers = corpus_of([[[0, 1], [1, 0, 1]]] * 20), np.arange(1, 40, 2)
    s = infer_thoughts.Settings(corpus="", model="", out_dir="", max_new=60, samples=8)
    corpus.tokenizer = type("Tok", (), vars(TOY) | {"decode": staticmethod(lambda ids, first=True: str(ids))})

    path = tmp_path / "000000.npz"  # the part of which something is always checked

    def run_part():
        infer_thoughts.run_part(path, numbers, Engine(model), corpus, s, None)

    run_part()
    found, n_checked = (np.load(path)[k][0] for k in ("check", "n_checked"))
    assert n_checked >= 1 and (found > 0).any() and (found[0] <= found[1]).all()
    path.unlink()
    fast = engine_module.draw
    monkeypatch.setattr(engine_module, "draw", lambda *a: (lambda t, p: (t, p + error))(*fast(*a)))
    tolerance = infer_thoughts.TOLERANCE[dtype]
    message = f"by {error:.1g}.* nats a token .at most {tolerance} wanted.* over a thought by .* the root"
    with pytest.raises(UserError, match=message) as e:
        run_part()
    each, whole = (float(e.value.args[0].split(" by ")[i].split()[0]) for i in (1, 2))
    assert each < tolerance and whole > infer_thoughts.SUM_TOLERANCE[dtype] and not path.exists()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The real SmolLM2-135M in Hugging Face layout, with markers (needs ../shared and its package)."""
    import subprocess
    import sys

    if not SHARED.exists():
        pytest.skip("no ../shared here")
    folder = tmp_path_factory.mktemp("smollm2")
    done = subprocess.run(
        [sys.executable, SHARED / "tools/smollm2_hf.py", folder / "hf"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"SmolLM2 cannot be written: {done.stderr.strip().splitlines()[-1]}")
    train.main(train.Settings(init_from=str(folder / "hf"), max_steps=0, out_dir=str(folder / "marked")))
    return folder / "marked"


def gsm8k_prompts(tok, n: int) -> list:
    import json

    lines = (SHARED / "data/gsm8k/test.jsonl").read_text().splitlines()[: 3 * n : 3]
    problems = [json.loads(line) for line in lines]
    return [
        tok.encode_array(p["question"] + ("\n" + p["answer"]) * (i % 2)) for i, p in enumerate(problems)
    ]  # short ones and long ones


@pytest.mark.long
def test_smollm2_decodes_as_transformers(smollm2):
    """50 GSM8K prompts of mixed length, batched: the same greedy tokens as transformers one by one, and
    log_q within 1e-3 nats a token."""
    transformers = pytest.importorskip("transformers")
    model, tok = train.load_model(smollm2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompts, worst = gsm8k_prompts(tok, 50), 0.0
    ours = Engine(model).generate(
        prompts, np.arange(50), 1, Sampling(32, frozenset({tok.eos}), temperature=0.0)
    )
    for prompt, [(ids, _, log_q)] in zip(prompts, ours):
        out = reference.generate(
            torch.from_numpy(prompt[None].astype(np.int64)),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=tok.eos,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        assert ids.tolist() == out.sequences[0, len(prompt) :].tolist()
        scores = (
            reference.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
            .double()
            .sum()
            .item()
        )
        worst = max(worst, abs(log_q - scores) / len(ids))
    print(f"largest difference of log_q: {worst:.2e} nats a token")
    assert worst < 1e-3


@pytest.mark.long
def test_memory_stays_within_the_plan(smollm2):
    """64 thoughts of a 2,048-token prompt: the peak beyond the weights is below the planned figure."""
    import subprocess
    import sys

    code = f"""
import gc, sys, threading, time, numpy as np
sys.path.insert(0, {str(ROOT)!r})
from data.lib.engine import Engine, Sampling
from train import load_model
model, tok = load_model({str(smollm2)!r}); engine = Engine(model)
engine.score([np.arange(10)], [[np.arange(10)]]); gc.collect()
def rss():
    return 4096 * int(open("/proc/self/statm").read().split()[1])
before, peak = rss(), [0]
def watch():
    while True:
        peak[0] = max(peak[0], rss())
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
_, _, planned, _ = engine.plan(64, 2047, 128, 1)
prompt = np.random.default_rng(0).integers(0, 40000, 2048)
def score(slots, drawn):
    print(len(engine.score([prompt], [[ids for ids, _, _ in drawn[0]]], list(slots))), file=sys.stderr)
engine.generate([prompt], [0], 64, Sampling(128, frozenset({{tok.eol}})), on_ended=score)
print(planned, peak[0] - before)
"""
    if sys.platform != "linux":
        pytest.skip("no Linux")
    planned, used = map(
        int,
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split(),
    )
    print(f"planned {planned / 1e9:.2f} GB, used {used / 1e9:.2f} GB")
    assert 0.05 * planned < used < planned


@pytest.mark.parametrize(
    "n_rows,prefill_tokens,shared", [(0, 2048, 40), (3, 7, 40), (5, 40, 33), (0, 16, 31)]
)
def test_a_start_that_all_prompts_share_is_computed_once(n_rows, prefill_tokens, shared, monkeypatch):
    """Few-shot prompts: the same samples as the slow reference, and the shared tokens pass through the
    model once, not once a prompt."""
    model = random_model()
    head = np.random.default_rng(1).integers(0, 50, shared)
    prompts = [np.concatenate((head, p)) for p in prompts_of(9)] + [np.append(head, 7)]
    assert engine_module.shared_length(prompts) == (shared if shared >= 32 else 0)
    assert engine_module.shared_length([prompts[0]]) == engine_module.shared_length(prompts_of(5)) == 0
    slow = [
        [sample_slowly(model, p, Sampling(10, frozenset({3}), 5), i, k) for k in range(2)]
        for i, p in enumerate(prompts)
    ]
    engine, seen, forward = Engine(model, n_rows), [], Runner.forward
    engine.PREFILL_TOKENS = prefill_tokens
    monkeypatch.setattr(
        Runner,
        "forward",
        lambda self, ids, positions, attend: (
            seen.append(positions.numpy().copy()) or forward(self, ids, positions, attend)
        ),
    )
    for _ in range(2):  # also when the cache is used again
        seen.clear()
        for mine, theirs in zip(
            engine.generate(prompts, np.arange(10), 2, Sampling(10, frozenset({3}), 5)), slow
        ):
            for (ids, finished, log_q), (slow_ids, slow_finished, slow_log_q) in zip(mine, theirs):
                assert (
                    ids.tolist() == slow_ids
                    and finished == slow_finished
                    and log_q == pytest.approx(slow_log_q, abs=1e-3)
                )
        early = (np.concatenate(seen) < shared).sum()
        assert early == shared if shared >= 32 else early > 5 * shared


def test_prompts_that_are_all_alike():
    """Nothing is left to prefill behind the shared start."""
    model, prompt = random_model(), np.arange(40)
    sampling = Sampling(6, frozenset({3}), 5)
    slow = [sample_slowly(model, prompt, sampling, i, 0) for i in range(3)]
    for mine, theirs in zip(Engine(model).generate([prompt] * 3, np.arange(3), 1, sampling), slow):
        assert mine[0][0].tolist() == list(theirs[0]) and mine[0][2] == pytest.approx(theirs[2], abs=1e-3)


@pytest.mark.parametrize("n_rows,prefill_tokens,start", [(4, 2048, 0), (12, 5, 40), (1024, 2048, 40)])
def test_scores_with_the_keys_of_slots_are_the_plain_ones(n_rows, prefill_tokens, start):
    """Of prompts that are taken in later, too, and where all begin alike; prefixes as short as BOS."""
    model, rng = random_model(), np.random.default_rng(2)
    prompts = [np.concatenate((np.arange(start), prompt)) for prompt in prompts_of(13)]
    engine, seen = Engine(model, n_rows), {}
    engine.PREFILL_TOKENS = prefill_tokens

    def score(slots, results):
        prefixes = [prompts[i][: rng.integers(1, len(prompts[i]))] for i in slots.values()]
        tails = [[ids for ids, _, _ in results[i]] + [np.arange(i)] for i in slots.values()]
        plain = engine.score(prefixes, tails)
        assert not seen.keys() & slots.values()
        seen.update(dict.fromkeys(slots.values()))
        for one, other in zip(engine.score(prefixes, tails, list(slots)), plain):
            for a, b in zip(one, other):
                np.testing.assert_allclose(a, b, atol=1e-4)

    engine.generate(prompts, np.arange(13), 3, Sampling(9, frozenset({3}), 5), on_ended=score)
    assert sorted(seen) == list(range(13))


@pytest.mark.parametrize("samples,n_slots,prefill_tokens", [(1, 3, 2048), (5, 4, 7), (9, 14, 30)])
def test_the_scheduler_grows_every_sample_once(samples, n_slots, prefill_tokens):
    """Without a model: each sample starts in a free lane behind its whole prompt, and ends once."""
    prompts, rng = prompts_of(12), np.random.default_rng(1)
    noise = np.arange(12 * samples).reshape(12, samples)
    scheduler = Scheduler(prompts, noise, Layout(n_slots, 20, 8, min(3, samples)), prefill_tokens)
    prefilled, ended, length, told = {}, [], {}, []
    while step := scheduler.schedule():
        assert sorted(set(step.lanes)) == step.lanes.tolist()
        for sequence in step.started:
            slot = sequence.lane // scheduler.layout.lanes
            assert prefilled.pop(slot, None) in (len(prompts[sequence.prompt]) - 1, None)
            assert sequence.last_token == prompts[sequence.prompt][-1]
            length[sequence.lane] = 0
        for slot, n in zip(step.prefill.slots.tolist(), step.prefill.lengths) if step.prefill else ():
            prefilled[slot] = n
            assert step.prefill.ids.size <= prefill_tokens
            assert not len(step.lanes), "a step takes in prompts or samples tokens"
        assert step.lengths.tolist() == [length[lane] for lane in step.lanes.tolist()]
        length |= {lane: length[lane] + 1 for lane in step.lanes.tolist()}
        growing = rng.random(len(step.lanes)) < 0.7
        ended += scheduler.postprocess(step, step.lengths + 1, growing)
        free = len(scheduler.free_slots) if scheduler.waiting else 0
        taken = scheduler.take_ended()
        if taken and scheduler.running:
            assert 8 * (len(taken) + free) >= n_slots, "prompts are scored and taken in many at a time"
        for slot, prompt in taken.items():
            assert sum(s.prompt == prompt for s in ended) == samples and slot not in scheduler.pending
            told.append(prompt)
    assert sorted(told) == list(range(12))
    assert sorted((s.prompt, s.sample) for s in ended) == [(i, k) for i in range(12) for k in range(samples)]
    assert sorted(s.noise for s in ended) == list(range(12 * samples))


@pytest.mark.parametrize("temperature,top_p", [(1.0, 0.9), (0.6, 0.9), (0.6, 1.0), (1.7, 0.3), (1.0, 1e-9)])
def test_temperature_and_nucleus_are_those_of_transformers(temperature, top_p):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 3000, generator=generator)
    logits[:50] *= 0.01  # nearly even: thousands of tokens in the nucleus
    expected = warpers.TemperatureLogitsWarper(temperature)(None, logits)
    expected = warpers.TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    tokens, log_p = draw(logits, uniform, temperature, top_p)
    reference = torch.log_softmax(expected.double(), dim=-1)
    torch.testing.assert_close(
        log_p, reference[torch.arange(200), tokens], atol=1e-4, rtol=0
    )  # never a token outside, and with its probability
    if top_p < 1:
        kept = nucleus(logits / temperature, top_p).isfinite()
        assert (kept != expected.isfinite()).sum() <= 2  # a border within rounding
    assert draw(logits, uniform, 0.0, top_p)[0].equal(logits.argmax(-1))


def test_a_sample_ends_by_what_it_says():
    """ends(ids) is asked every 8 tokens; the others go on as they would have."""
    model, prompts = random_model(), prompts_of(8)
    free = Engine(model).generate(prompts, np.arange(8), 2, Sampling(40, frozenset(), 5))
    cut = Engine(model, 6).generate(
        prompts, np.arange(8), 2, Sampling(40, frozenset(), 5), ends=lambda ids: 11 in ids
    )
    stopped = 0
    for row, whole in zip(cut, free):
        for (ids, finished, _), (all_ids, _, _) in zip(row, whole):
            at = all_ids.tolist().index(11) + 1 if 11 in all_ids[:32] else 40
            length = -(-at // 8) * 8
            assert ids.tolist() == all_ids[:length].tolist() and finished == (length < 40)
            stopped += finished
    assert 0 < stopped < 16


def test_a_packed_model_can_still_be_trained():
    """The joined products are for sampling alone: with gradients the layers' own are used."""
    model = random_model()
    plain = model(torch.tensor([[1, 2, 3]]))
    Engine(model)
    hidden = model(torch.tensor([[1, 2, 3]]))
    assert torch.allclose(hidden, plain, atol=1e-6)
    hidden.sum().backward()
    assert all(p.grad is not None for p in model.layers.parameters())
