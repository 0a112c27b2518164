"""What graded responses and nats amount to: scores with standard errors, paired tests, units.

A record is what eval_math.py writes for a problem: {"responses": [greedy, sampled ...],
"alike": the group of equal answers that each sampled response is in, "level", "subject"}.
Two runs on the same problems are hard and easy on the same ones, so a difference is
always paired: over problems for accuracy, over documents for likelihood.
"""

import math
from typing import NamedTuple

import numpy as np

from data.lib.corpus import Corpus

BOUNDS = (1, 4, 16)  # of how many thoughts each: nll_bound in results.json

def mean_and_error(values) -> tuple[float, float]:
    """Mean and its standard error (with n - 1, as lm-evaluation-harness)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), 0.0
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


# -------------------- accuracy


def pass_at(n: int, right: int, k: int) -> float:
    """Unbiased chance that one of k responses is right, from n of which `right` are.

    Chen et al. 2021, arXiv 2107.03374.
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(record: dict, k: int) -> bool:
    """Whether the commonest answer of the first k samples is right.

    Of several answers that are equally common, the one that came first counts.
    """
    sampled = record["responses"][1 : k + 1]
    groups = record["alike"][:k]
    votes = [g for g, r in zip(groups, sampled) if r["extracted"] is not None]
    if not votes:
        return False
    winner = max(votes, key=lambda group: (votes.count(group), -group))
    return sampled[winner]["correct"]


def scores(records: list[dict], k: int) -> dict:
    """Accuracies of the greedy responses and of the k samples, and counts.

    flexible: by what extract_answer finds; strict: only by "The final answer is X."
    """
    greedy = [r["responses"][0] for r in records]
    flexible, flexible_error = mean_and_error([r["correct"] for r in greedy])
    strict, strict_error = mean_and_error([r["strict"] for r in greedy])
    out = {
        "n": len(records),
        "accuracy": flexible,
        "accuracy_se": flexible_error,
        "exact_match,flexible-extract": flexible,
        "exact_match_stderr,flexible-extract": flexible_error,
        "exact_match,strict-match": strict,
        "exact_match_stderr,strict-match": strict_error,
        "cut_off": sum(r["cut_off"] for r in greedy),
        "no_answer": sum(r["extracted"] is None for r in greedy),
        "forced": sum(r["forced"] for r in greedy),
        "not_graded": sum(not x["graded"] for r in records for x in r["responses"]),
    }
    if k:
        out["sampled"] = sampled_scores(records, k)
    for part in ("level", "subject"):
        groups = {}
        for r in records:
            if part in r:
                groups.setdefault(r[part], []).append(r["responses"][0]["correct"])
        if groups:
            out[f"by_{part}"] = {
                name: {"n": len(right), "accuracy": float(np.mean(right))}
                for name, right in sorted(groups.items())
            }
    return out


def sampled_scores(records: list[dict], k: int) -> dict:
    samples = [r["responses"][1:] for r in records]
    right = [sum(x["correct"] for x in row) for row in samples]
    mean, error = mean_and_error([n / k for n in right])
    out = {"k": k, "accuracy": mean, "accuracy_se": error}
    out["cut_off"] = sum(x["cut_off"] for row in samples for x in row)
    for j in [2**b for b in range(k.bit_length()) if 2**b < k] + [k]:
        out[f"pass@{j}"] = float(np.mean([pass_at(k, n, j) for n in right]))
        if j > 1:
            out[f"maj@{j}"] = float(np.mean([majority(r, j) for r in records]))
    return out


# -------------------- two runs


def sign_test(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value of McNemar's test.

    only_a, only_b: how many problems only the one run or only the other solves. If the
    runs are equally good, each such problem falls to either side like a fair coin.
    """
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired(a: dict, b: dict) -> dict:
    """Two runs {problem: right} on the same problems: b - a, its error, counts, p-value."""
    mean, error = mean_and_error([float(b[q]) - float(a[q]) for q in a])
    only_a = sum(a[q] and not b[q] for q in a)
    only_b = sum(b[q] and not a[q] for q in a)
    return {
        "difference": mean,
        "difference_se": error,
        "only_first": only_a,
        "only_second": only_b,
        "p": sign_test(only_a, only_b),
    }


def paired_difference(a, b) -> tuple[float, float]:
    """(mean, standard error) of b - a over documents, in nats.

    a, b [n_docs]: arrays of likelihood.npz, of two models or measures on the same documents.
    """
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    return mean_and_error(difference)


# -------------------- nats in units


class Scored(NamedTuple):
    """The chunks of a corpus whose likelihood is measured, and their documents' questions."""

    numbers: np.ndarray
    asked: np.ndarray
    docs: np.ndarray  # of the documents of `numbers`, rising
    counts: dict  # of what is left out


def n_bytes(corpus: Corpus, numbers) -> list[int]:
    return [len(corpus.raw(i)) for i in numbers]


def by_document(corpus: Corpus, scored: Scored, nats: dict, questions) -> dict:
    """What likelihood.npz holds of each document, [n_docs]: doc, bytes, tokens and nats.

    nats: {name: [len(scored.numbers)]}; questions: [len(scored.asked)], in nats, too.
    """

    def total(numbers, values):
        place = np.searchsorted(scored.docs, corpus.doc_of(numbers))
        values = np.asarray(values, dtype=np.float64)
        return np.bincount(place, weights=values, minlength=len(scored.docs))

    numbers = scored.numbers
    n_tokens = np.diff(corpus.chunks)[numbers]
    arrays = {"doc": scored.docs}
    arrays["bytes"] = total(numbers, n_bytes(corpus, numbers)).astype(np.int64)
    arrays["tokens"] = total(numbers, n_tokens).astype(np.int64)
    arrays |= {name: total(numbers, values) for name, values in nats.items()}
    arrays["questions"] = total(scored.asked, questions)
    return arrays


def in_units(corpus: Corpus, scored: Scored, arrays: dict) -> dict:
    """Nats per byte, per token (_token) and per document (_document) of all documents.

    Gives nll, or nll_bound {k: ...}, nll_thoughtless and nll_alone; and nll_questions per
    byte of the questions (None where there are none); and the numbers that it divided by.
    """
    n_asked = sum(n_bytes(corpus, scored.asked))
    counts = {
        "bound_docs": len(scored.docs),
        "bound_chunks": len(scored.numbers),
        "bytes": int(arrays["bytes"].sum()),
        "tokens": int(arrays["tokens"].sum()),
        "question_bytes": n_asked,
    }
    units = {"": "bytes", "_token": "tokens", "_document": "bound_docs"}
    figures = {}
    for unit, divisor in units.items():
        n = counts[divisor]
        mean = {name: float(values.sum() / n) for name, values in arrays.items()}
        if "nll" in mean:
            figures[f"nll{unit}"] = mean["nll"]
            continue
        figures[f"nll_bound{unit}"] = {str(k): mean[f"bound_{k}"] for k in BOUNDS}
        figures[f"nll_thoughtless{unit}"] = mean["thoughtless"]
        figures[f"nll_alone{unit}"] = mean["alone"]
    questions = arrays["questions"].sum()
    figures["nll_questions"] = float(questions / n_asked) if n_asked else None
    return figures | counts
