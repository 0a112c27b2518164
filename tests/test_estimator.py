"""The estimator is exact: with two letters and thoughts of a few tokens, every thought is
enumerated and the numbers are known.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TOY, corpus_of

import infer_thoughts
from data.lib.corpus import POSTERIOR, PRIOR, hash_uniform
from data.lib.engine import Engine, Sampling
from infer_thoughts import (
    NO_THOUGHT,
    EStep,
    Limits,
    bound,
    choose,
    infer,
    normalise,
    pick,
    score_slowly,
    thoughtless,
    write_chunk,
)

MAX_NEW = 4  # thoughts of up to three tokens and EOL
CORPUS = corpus_of([[[0, 1], [1, 0, 1]]])
CHUNK, CONTEXT = 1, [0]
LIMITS = Limits(before=3, max_new=MAX_NEW, seq_len=64)


@torch.inference_mode()
def slow_log_prob(model, ids, start: int, end: int) -> float:
    """Sum of log p(ids[t] | ids[:t]), one forward pass a token: no batching, no span
    arithmetic, nothing shared with the code under test.
    """
    total = 0.0
    for t in range(start, end):
        logits = model.logits(model(torch.tensor([ids[:t]])))[0, -1].double()
        total += float(logits[ids[t]] - logits.logsumexp(0))
    return total


@pytest.fixture(scope="module")
def exact(toy_model):
    """All thoughts that end within MAX_NEW tokens: (thoughts, log q, log p(z, x | c)), by the
    slow reference.
    """
    letters = [t for t in range(TOY.n_vocab) if t != TOY.eol]
    thoughts = [list(z) for n in range(MAX_NEW) for z in itertools.product(letters, repeat=n)]
    c, x, t = [0, 1], [1, 0, 1], TOY
    head = [t.bos, *c]
    log_q, log_p = [], []
    with torch.inference_mode():
        for z in thoughts:
            q = [*head, t.sol, t.eol, *x, t.sol, t.pos, *z, t.eol]
            p = [*head, t.sol, t.pri, *z, t.eol, *x]
            log_q.append(slow_log_prob(toy_model, q, len(q) - len(z) - 1, len(q)))
            log_p.append(slow_log_prob(toy_model, p, len(head) + 2, len(p)))
    return thoughts, np.array(log_q), np.array(log_p)


@pytest.fixture(scope="module")
def sampled(toy_model):
    """100,000 thoughts of the chunk, sampled and weighed by the code under test."""
    return infer(Engine(toy_model), CORPUS, np.array([CHUNK]), EStep(LIMITS, 100000))


def index_of(samples, thoughts) -> np.ndarray:
    """Number of each finished sample in the enumeration; -1 for one that was cut off."""
    number = {tuple(z): i for i, z in enumerate(thoughts)}
    return np.array(
        [number[tuple(z)] if ok else -1 for z, ok in zip(samples.thoughts[0], samples.finished[0])]
    )


def test_the_enumeration_is_worth_something(exact):
    _, log_q, log_p = exact
    assert 0.9 < np.exp(log_q).sum() < 0.9999, "most thoughts end in time, some are cut off"
    assert np.ptp(log_p - log_q) > 3, "weights differ"


def test_sampled_frequencies_match_q(exact, sampled):
    thoughts, log_q, _ = exact
    n = sampled.finished.shape[1]
    expected = np.append(np.exp(log_q), 1 - np.exp(log_q).sum()) * n  # the last bin: cut off
    counts = np.bincount(index_of(sampled, thoughts) % len(expected), minlength=len(expected))
    rare = expected < 10
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    chi2, df = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    # Wilson-Hilferty: the cube root of chi2/df is nearly normal
    z = ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / np.sqrt(2 / (9 * df))
    assert df > 10 and z < 3.1, f"chi2 {chi2:.1f} with {df} degrees of freedom (p < 0.001)"


def test_weights_equal_the_slow_reference(exact, sampled):
    thoughts, log_q, log_p = exact
    index, done = index_of(sampled, thoughts), sampled.finished[0]
    np.testing.assert_allclose(sampled.log_q[0][done], log_q[index[done]], atol=1e-4)
    np.testing.assert_allclose(sampled.log_p[0][done], log_p[index[done]], atol=1e-4)
    assert (sampled.log_w[0][~done] == -np.inf).all() and (~done).any()


def test_mean_weight_is_the_likelihood(exact, sampled):
    thoughts, log_q, log_p = exact
    p_x = np.exp(log_p).sum()
    # exact expectation of w under q, with the weights of the code under test: every thought
    # that was ever sampled, the rest by reference
    index, done = index_of(sampled, thoughts), sampled.finished[0]
    log_w = log_p - log_q
    log_w[index[done]] = sampled.log_w[0][done]
    assert abs((np.exp(log_q) * np.exp(log_w)).sum() - p_x) < 1e-5
    w = np.exp(sampled.log_w[0])  # cut off: exp(-inf) = 0
    assert abs(w.mean() - p_x) < 4 * w.std() / np.sqrt(len(w))


def test_thoughts_from_the_prior_are_weighed_right(toy_model, exact):
    """--proposal=prior: log q is the prior's, which has not read x; the mean weight is the
    same likelihood, and the check holds.
    """
    thoughts, _, log_p = exact
    numbers = np.array([CHUNK])
    got = infer(Engine(toy_model), CORPUS, numbers, EStep(LIMITS, 20000, proposal=PRIOR))
    index, done = index_of(got, thoughts), got.finished[0]
    head = [TOY.bos, 0, 1, TOY.sol, TOY.pri]
    for k in np.flatnonzero(done)[:40]:
        ids = [*head, *thoughts[index[k]], TOY.eol]
        assert got.log_q[0, k] == pytest.approx(slow_log_prob(toy_model, ids, len(head), len(ids)), abs=1e-4)
        assert got.log_p[0, k] == pytest.approx(log_p[index[k]], abs=1e-4)
        assert got.log_w[0, k] == pytest.approx(got.log_x[0, k], abs=1e-4), "the prior cancels"
    w = np.exp(got.log_w[0])
    assert abs(w.mean() - np.exp(log_p).sum()) < 4 * w.std() / np.sqrt(len(w))
    e_step = EStep(LIMITS, 50, proposal=PRIOR)
    few = infer(Engine(toy_model), CORPUS, numbers, e_step)
    assert (infer_thoughts.check(toy_model, CORPUS, numbers, few, e_step, {}) < 1e-4).all()
    assert infer_thoughts.check(toy_model, CORPUS, numbers, few, EStep(LIMITS), {}).max() > 1e-2, (
        "not the posterior's"
    )


def test_computed_tokens_are_all_that_the_model_reads(toy_model):
    corpus = corpus_of([[[0, 1], [1, 0, 1]]])
    engine, read = Engine(toy_model), []
    forward = engine.runner.forward
    engine.runner.forward = lambda ids, *rest: read.append(len(ids)) or forward(ids, *rest)
    got = infer(engine, corpus, np.array([1]), EStep(Limits(3, 6, 64), 12, seed=1))
    prompt = 1 + 2 + 2 + 3 + 2  # BOS c SOL EOL x SOL POS
    thoughts = {tuple(z) for z, ok in zip(got.thoughts[0], got.finished[0]) if ok}
    assert len(thoughts) < got.finished.sum(), "some are equal, and scored once"
    scored = 3 + (2 + 3) + sum(2 + len(z) + 1 + 3 for z in thoughts)
    # The prompt's last token is read by each sample.
    assert sum(read) == prompt - 1 + got.length.sum() + scored
    assert got.computed.tolist() == [sum(read) + 1]


def test_resampling_approaches_the_posterior(exact, sampled):
    thoughts, _, log_p = exact
    posterior = np.exp(log_p) / np.exp(log_p).sum()
    index = index_of(sampled, thoughts)
    rng, distance = np.random.default_rng(0), {}
    for k in (1, 4, 16, 64):  # 40,000 E-steps with K = k each, from the pool of samples
        rows = rng.integers(0, len(index), (40000, k))
        picks = pick(sampled.log_w[0][rows], rng.random(40000))
        chosen = index[rows[np.arange(40000), picks]][picks >= 0]
        distance[k] = (
            np.abs(np.bincount(chosen, minlength=len(posterior)) / len(chosen) - posterior).sum() / 2
        )
    assert distance[1] > distance[4] > distance[16] > distance[64], distance
    assert distance[64] < 0.03 < 0.1 < distance[1], distance


@pytest.fixture(scope="module")
def without(toy_model):
    """p(x | c), p(SOL | c) and p(x | c, SOL EOL) of the chunk, by the slow reference."""
    t, head, x = TOY, [TOY.bos, 0, 1], [1, 0, 1]
    none = [*head, t.sol, t.eol, *x]
    spans = ([*head, *x], 3, 6), (none, 3, 4), (none, 5, 8)
    return tuple(np.exp(slow_log_prob(toy_model, *span)) for span in spans)


def p_text(without, behind_thought):
    """The probability of the text, from p(x | c, SOL PRI) or an estimate of it."""
    alone, sol, none = without
    return alone + sol * ((1 - NO_THOUGHT) * behind_thought + NO_THOUGHT * none)


def test_bound_tightens_with_k(exact, sampled, without):
    log_p_x = np.log(p_text(without, np.exp(exact[2]).sum()))
    values = [bound(sampled, k)[0] for k in (1, 4, 16, 256)]
    assert values == sorted(values) and values[-1] - values[0] > 0.05
    assert values[2] < log_p_x + 0.01 and abs(values[-1] - log_p_x) < 0.02


def by_hand(w, **others) -> SimpleNamespace:
    """What bound() reads, from weights and probabilities."""
    logs = {f"log_{k}": np.log(np.array([v])) for k, v in others.items()}
    with np.errstate(divide="ignore"):
        return SimpleNamespace(log_w=np.log(np.array(w)), **logs)


def test_bound_by_hand():
    rest = dict(alone=0.01, sol=0.5, none=0.2)

    def text(w):
        return np.log(0.01 + 0.5 * ((1 - NO_THOUGHT) * w + NO_THOUGHT * 0.2))

    got = by_hand([[1.0, 3.0, 2.0, 2.0]], **rest)
    assert bound(got, 1)[0] == pytest.approx(np.mean([text(1), text(3), text(2), text(2)]))
    assert bound(got, 2)[0] == pytest.approx(text(2))
    cut = by_hand([[1.0, 0.0]], **rest)
    assert bound(cut, 1)[0] == pytest.approx((text(1) + text(0)) / 2), "a group that was cut off stays in"
    assert bound(cut, 2)[0] == pytest.approx(text(0.5))
    assert bound(by_hand([[0.0, 0.0]], **rest), 1)[0] == pytest.approx(text(0)), "finite with all cut off"
    assert thoughtless(got)[0] == pytest.approx(np.log(0.01 + 0.5 * 0.2))


def test_the_bound_holds_whatever_is_cut_off(toy_model, exact, without):
    """By enumeration, from lengths that cut off nearly all: the limit in k, the mean at k = 1, no gain.

    Thoughts of up to three tokens are a part of p(x | c, SOL PRI), so p_text made of them is a lower bound of
    the true one, and what lies below the one lies below the other."""
    thoughts, log_q, log_p = exact
    sizes, w = np.array([len(z) for z in thoughts]), np.exp(log_p - log_q)
    log_p_text = np.log(p_text(without, np.exp(log_p).sum()))
    K, shares, before = 2**14, [], {}
    for max_new in range(1, MAX_NEW + 1):
        got = infer(Engine(toy_model), CORPUS, np.array([CHUNK]), EStep(Limits(3, max_new, 64), K))
        ends = sizes < max_new
        shares.append(1 - np.exp(log_q[ends]).sum())
        values = {k: bound(got, k)[0] for k in (1, 8, 64, 512, K)}
        limit = np.log(p_text(without, np.exp(log_p[ends]).sum()))
        assert values[K] == pytest.approx(limit, abs=0.02), "it tends to thoughts that end in time"
        assert list(values.values()) == sorted(values.values()), "tighter with k"
        each = np.log(p_text(without, np.append(w[ends], 0.0)))  # of each thought; the last: cut off
        chance = np.append(np.exp(log_q[ends]), shares[-1])
        expected, spread = chance @ each, np.sqrt(chance @ each**2 - (chance @ each) ** 2)
        assert abs(values[1] - expected) < 4 * spread / np.sqrt(K) + 1e-5
        assert expected < limit <= log_p_text, "in expectation an upper bound of -log p_text"
        fewer_cut = all(values[k] >= value - 1e-5 for k, value in before.items())
        assert fewer_cut, "the same noise, fewer cut off: never worse"
        before = values
    assert shares[0] > shares[1] > 0.5 > 0.1 > shares[-1] > 0, "from most to few"


def test_cutting_off_never_improves_the_bound():
    """Any weights, any probabilities, any further thought cut off."""
    rng = np.random.default_rng(0)
    others = {k: -5 * rng.random(1000) for k in ("log_none", "log_alone", "log_sol")}
    got = SimpleNamespace(log_w=3 * rng.normal(size=(1000, 8)), **others)
    for _ in range(8):
        log_w = np.where(rng.random(got.log_w.shape) < 0.3, -np.inf, got.log_w)
        fewer = SimpleNamespace(**vars(got) | {"log_w": log_w})
        for k in (1, 2, 4, 8):
            assert (bound(fewer, k) <= bound(got, k)).all() and np.isfinite(bound(fewer, k)).all()
        got = fewer


def test_cut_off_thoughts_weigh_nothing(toy_model):
    e_step = EStep(Limits(3, 2, 64), 200)  # one letter and EOL, or nothing
    got = infer(Engine(toy_model), CORPUS, np.array([CHUNK]), e_step)
    assert 0 < got.finished.sum() < 200
    weights = normalise(got.log_w)
    assert (weights[~got.finished] == 0).all() and weights.sum() == pytest.approx(1)
    assert got.finished[0, pick(got.log_w, np.array([0.999]))[0]]
    none = np.full((1, 4), -np.inf)
    assert pick(none, np.array([0.5]))[0] == -1 and normalise(none).sum() == 0


def test_a_thought_with_another_marker_is_cut_off(toy_model, exact):
    """And never picked; the mean weight is then p(z, x | c) of all other thoughts. Here 0 is a marker."""
    corpus = corpus_of([[[0, 1], [1, 0, 1]]])
    corpus.tokenizer = SimpleNamespace(**vars(TOY) | {"markers": TOY.markers | {0}})
    got = infer(Engine(toy_model), corpus, np.array([CHUNK]), EStep(LIMITS, 40000))
    for ids, length, finished in zip(got.thoughts[0], got.length[0], got.finished[0]):
        assert (0 in ids) == (ids[-1:].tolist() == [0]) and not (finished and 0 in ids)
        assert len(ids) == length - finished
    thoughts, _, log_p = exact
    p_x = sum(np.exp(p) for z, p in zip(thoughts, log_p) if 0 not in z)
    assert 0.1 < p_x / np.exp(log_p).sum() < 0.9, "it matters"
    w = np.exp(got.log_w[0])
    assert abs(w.mean() - p_x) < 4 * w.std() / np.sqrt(len(w))


def test_pick_follows_the_weights():
    log_w = np.tile(np.log([1.0, 0.0001, 5.0, 2.0]), (100000, 1))
    counts = np.bincount(pick(log_w, hash_uniform(3, 0, np.arange(100000))), minlength=4) / 100000
    np.testing.assert_allclose(counts, np.array([1, 0.0001, 5, 2]) / 8.0001, atol=0.006)


@pytest.fixture(scope="module")
def two_chunks(toy_model):
    """Exact log p of the second chunk given each thought of the first, and of the document:
    [[0, 1], [1, 0]], thoughts of up to two tokens.

    (thoughts, log p(z1, x1), p(x2 | x1 bare), p(x1, x2) with the first thought in the
    second's context, its form a fair coin)
    """
    t, x1, x2 = TOY, [0, 1], [1, 0]
    letters = [i for i in range(t.n_vocab) if i != t.eol]
    thoughts = [list(z) for n in range(3) for z in itertools.product(letters, repeat=n)]

    def p_chunk(head, x):  # log p(z, x | head) of all thoughts
        written = [[*head, t.sol, t.pri, *z, t.eol, *x] for z in thoughts]
        return np.array([score_slowly(toy_model, ids, len(head) + 2, len(ids)) for ids in written])

    first = p_chunk([t.bos], x1)
    bare = np.exp(p_chunk([t.bos, *x1], x2)).sum()
    total = 0.0
    for z, log_p in zip(thoughts, first):
        if not z:  # an empty thought is written as none
            total += np.exp(log_p) * bare
            continue
        prior, posterior = (
            [t.bos, t.sol, t.pri, *z, t.eol, *x1],
            [t.bos, t.sol, t.eol, *x1, t.sol, t.pos, *z, t.eol],
        )
        total += np.exp(log_p) * (np.exp(p_chunk(prior, x2)).sum() + np.exp(p_chunk(posterior, x2)).sum()) / 2
    return thoughts, first, bare, total


@pytest.mark.parametrize("K", [pytest.param(1, marks=pytest.mark.slow), 4, 16])
@pytest.mark.parametrize("context", ["bare", "thoughts"])
def test_document_estimates_are_unbiased(toy_model, two_chunks, context, K):
    """The mean over many documents of the product of their chunks' mean weights is p(x1, x2),
    with the context that is asked for.
    """
    thoughts, first, bare, with_thoughts = two_chunks
    n = 24000 // K
    corpus = corpus_of([[[0, 1], [1, 0]]] * n)
    picked = {}
    e_step = EStep(Limits(3, 3, 64), K, context, seed=K)
    got = infer(Engine(toy_model), corpus, np.arange(2 * n), e_step, picked)
    w = np.exp(got.log_w).mean(axis=1).reshape(n, 2)
    exact = np.exp(first).sum() * bare if context == "bare" else with_thoughts
    assert abs(w[:, 0].mean() - np.exp(first).sum()) < 4 * w[:, 0].std() / np.sqrt(n)
    estimate = w.prod(axis=1)
    assert abs(estimate.mean() - exact) < 4 * estimate.std() / np.sqrt(n)
    assert bool(picked) == (context == "thoughts")
    if (
        context == "thoughts"
    ):  # picks stand in the contexts, in both forms; and log_w is that of the written-out sequence
        forms = [form for i, (_, form) in picked.items() if i % 2 == 0]
        assert 0.4 < np.mean(np.array(forms) == PRIOR) < 0.6
        assert (
            infer_thoughts.check(toy_model, corpus, np.arange(20), take(got, range(20)), e_step, picked)
            < 1e-4
        ).all()
    if K > 1:  # the first chunk's picks are closer to its posterior than single samples are
        index, posterior = {tuple(z): i for i, z in enumerate(thoughts)}, np.exp(first) / np.exp(first).sum()

        def distance(chosen):
            return (
                np.abs(
                    np.bincount([index[tuple(z)] for z in chosen], minlength=len(posterior)) / len(chosen)
                    - posterior
                ).sum()
                / 2
            )

        rows = [row for row in range(0, 2 * n, 2) if got.pick[row] >= 0]
        single = distance([got.thoughts[row][got.finished[row].argmax()].tolist() for row in rows])
        assert distance([got.chosen(row).tolist() for row in rows]) < (0.95 if K == 4 else 0.6) * single


def take(got, rows):
    return infer_thoughts.Samples(
        **{k: [v[r] for r in rows] if isinstance(v, list) else v[list(rows)] for k, v in vars(got).items()}
    )


def test_raw_and_conditional_likelihoods(toy_model, sampled):
    """log p(x | c, z), and of x without a thought in the form that training shows."""
    t, x, head = TOY, [1, 0, 1], [TOY.bos, 0, 1]
    none = [*head, t.sol, t.eol, *x]
    assert sampled.log_alone[0] == pytest.approx(score_slowly(toy_model, [*head, *x], 3, 6), abs=1e-4)
    assert sampled.log_sol[0] == pytest.approx(score_slowly(toy_model, none, 3, 4), abs=1e-4)
    assert sampled.log_none[0] == pytest.approx(score_slowly(toy_model, none, 5, 8), abs=1e-4)
    np.testing.assert_array_equal(sampled.gain, sampled.log_x - sampled.log_none[0])
    for k in np.flatnonzero(sampled.finished[0])[:50]:
        ids = [*head, t.sol, t.pri, *sampled.thoughts[0][k], t.eol, *x]
        assert sampled.log_x[0, k] == pytest.approx(
            score_slowly(toy_model, ids, len(ids) - 3, len(ids)), abs=1e-4
        )


def test_selection_rules():
    n, K = 100000, 3
    log_w = np.tile([np.log(1.0), -np.inf, np.log(3.0)], (n, 1))
    u, gain, always = hash_uniform(3, 0, np.arange(n)), np.tile([-1.0, -np.inf, 2.0], (n, 1)), -np.inf

    def shares(rule, min_gain):
        picks = choose(rule, log_w, gain, min_gain, u)
        return np.bincount(picks + 1, minlength=K + 1) / n  # none, and each of the three

    assert (choose("argmax", log_w, gain, always, u) == 2).all()
    assert shares("uniform", always) == pytest.approx([0, 0.5, 0, 0.5], abs=0.01)
    assert shares("resample", always) == pytest.approx([0, 0.25, 0, 0.75], abs=0.01)
    dead = np.full((2, K), -np.inf)
    for rule in ("argmax", "uniform", "resample"):
        assert (choose(rule, dead, dead, always, u[:2]) == -1).all(), "no thought ended: there is no pick"
        assert (choose(rule, dead, dead, 0.0, u[:2]) == -1).all()
        enough, kept = choose(rule, log_w, gain, -1.0, u), choose(rule, log_w, gain, always, u)
        assert np.array_equal(enough, kept), "a gain of exactly min_gain is enough"
    # A pick that gains too little is dropped, and not drawn again.
    assert shares("uniform", 0.0) == pytest.approx([0.5, 0, 0, 0.5], abs=0.01)
    assert shares("resample", 0.0) == pytest.approx([0.25, 0, 0, 0.75], abs=0.01)
    assert shares("argmax", 2.5)[0] == 1


def test_picks_that_gain_too_little_are_dropped(toy_model):
    """The same picks as without the rule but for those, whose chunks are plain text in later contexts."""
    corpus, limits = corpus_of([[[0, 1], [1, 0]]] * 200), Limits(3, 4, 64)
    without, picked = {}, {}

    def picks(min_gain, picked):
        e_step = EStep(limits, 2, "thoughts", min_gain=min_gain)
        return infer(Engine(toy_model), corpus, np.arange(400), e_step, picked)

    every, some = picks(-np.inf, without), picks(0.0, picked)
    first = np.arange(0, 400, 2)  # their contexts are alike in both
    gains = every.gain[first, every.pick[first]]
    drawn = every.pick[first] >= 0
    dropped = drawn & (gains < 0)
    assert 20 < dropped.sum() < drawn.sum() - 20
    np.testing.assert_array_equal(some.pick[first], np.where(dropped, -1, every.pick[first]))
    gone = [row for row in first[dropped] if len(every.chosen(row))]
    assert gone and all(some.chosen(row) is None and row in without and row not in picked for row in gone)
    subset = np.concatenate((first[dropped][:10], first[dropped][:10] + 1, first[~dropped][:10] + 1))
    checked = infer_thoughts.check(toy_model, corpus, subset, take(some, subset), EStep(limits), picked)
    assert (checked < 1e-4).all(), "the numbers are those of contexts without the dropped thoughts"
    plain = score_slowly(toy_model, [TOY.bos, 0, 1, TOY.sol, TOY.eol, 1, 0], 5, 7)
    assert some.log_none[first[dropped] + 1] == pytest.approx(plain, abs=1e-4)


def test_gain_by_evidence_asks_the_mean_weight(toy_model):
    """A pick is dropped exactly where thoughts, taken together, explain the text worse than none does,
    whatever the text gains behind that one; the other picks stay."""
    corpus, limits = corpus_of([[[0, 1], [1, 0]]] * 100), Limits(3, 4, 64)

    def picks(**how):
        return infer(Engine(toy_model), corpus, np.arange(200), EStep(limits, 3, **how))

    every = picks()
    evidence = np.log(np.exp(every.log_w).mean(axis=1)) - every.log_none
    least = float(np.median(evidence))
    some, by_text = picks(min_gain=least, gain_by="evidence"), picks(min_gain=least)
    np.testing.assert_array_equal(some.pick, np.where(evidence < least, -1, every.pick))
    assert (some.pick != by_text.pick).sum() > 20, "the two rules differ"
    assert (some.pick == -1).sum() > 20 and (some.pick >= 0).sum() > 20


@pytest.mark.parametrize("samples,n_rows", [(1, 4), (3, 2), (4, 7), (16, 512)])
def test_cached_decoding_equals_teacher_forcing(toy_model, samples, n_rows):
    """Whatever the number of rows, refills and prompts of different lengths: the sampler's own
    log_q is the teacher-forced one.
    """
    rng = np.random.default_rng(1)
    corpus = corpus_of(
        [[rng.integers(0, 2, rng.integers(1, 9)).tolist() for _ in range(3)] for _ in range(9)]
    )
    numbers = np.arange(corpus.n_chunks)
    prompts = [write_chunk(corpus, i, list(corpus.before(i, 3)), None, POSTERIOR)[0] for i in numbers]
    engine = Engine(toy_model, n_rows)
    drawn = engine.generate(prompts, numbers, samples, Sampling(6, frozenset({TOY.eol})))
    got = infer(engine, corpus, numbers, EStep(Limits(3, 6, 64), samples))
    for i in numbers:
        for k, (ids, finished, log_q) in enumerate(drawn[i]):
            assert len(ids) <= 6 and finished == (ids[-1] == TOY.eol) == got.finished[i, k]
            assert TOY.eol not in ids[:-1]
            full = [*prompts[i], *ids]
            assert slow_log_prob(toy_model, full, len(prompts[i]), len(full)) == pytest.approx(
                log_q, abs=1e-4
            )
            if finished:
                assert got.log_q[i, k] == pytest.approx(log_q, abs=1e-4)


def test_samples_do_not_depend_on_the_batch(toy_model):
    corpus = corpus_of([[[i % 2, 1, i // 2 % 2]] for i in range(40)])
    every = infer(Engine(toy_model), corpus, np.arange(40), EStep(Limits(3, 6, 64), seed=7))
    few = infer(Engine(toy_model, 4), corpus, np.arange(13, 20), EStep(Limits(3, 6, 64), seed=7))
    for row, i in enumerate(range(13, 20)):
        assert [z.tolist() for z in few.thoughts[row]] == [z.tolist() for z in every.thoughts[i]]
    other = infer(Engine(toy_model), corpus, np.arange(40), EStep(Limits(3, 6, 64), seed=8))
    assert any(a.tolist() != b.tolist() for x, y in zip(every.thoughts, other.thoughts) for a, b in zip(x, y))


def test_prior_is_scored_with_its_text_and_posterior_without(toy_model):
    for form, expected in ((PRIOR, ([4, 6], (5, 7), (7, 10))), (POSTERIOR, ([4, 5], (10, 12), (5, 8)))):
        ids, part = write_chunk(CORPUS, CHUNK, CONTEXT, [1], form)
        assert ids[3:5].tolist() == expected[0] and part.thought == expected[1] and part.chunk == expected[2]
        assert (
            ids[part.chunk[0] : part.chunk[1]].tolist() == [1, 0, 1] and ids[part.thought[1] - 1] == TOY.eol
        )
