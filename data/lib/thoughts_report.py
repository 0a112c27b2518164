"""What an E-step tells people: lines for a terminal, and what report.py draws.

shown.npz holds what only the E-step knows:

    chunks [m], sizes [m, K], ids    all thoughts of some chunks, end to end
    docs [d], lengths [2 d], log_p   some documents in both forms (as_trained): the
                                     model's log p of each token but the first
"""

import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from data.lib.cli import LEAST, UserError
from data.lib.corpus import (
    POSTERIOR,
    PRIOR,
    RAW,
    Corpus,
    Thoughts,
    hash_uniform,
    layout,
    open_thoughts,
)

EXAMPLES = 50  # chunks of the first part that are written out in full
CHUNKS, DOCUMENTS = 2000, 6  # in shown.npz; about so many chunks
LONGEST = 512  # tokens of a document
SHOWN = 7  # a first key of hash_uniform, as in data/lib/corpus.py


def as_trained(corpus: Corpus, d: int, span, form: int):
    """layout() of a document in a form; span(i): the thought of chunk i."""
    numbers = range(corpus.docs[d], corpus.docs[d + 1])
    spans = [span(i) for i in numbers]
    forms = [form if len(z) else RAW for z in spans]
    return layout(
        corpus.tokenizer, list(map(corpus.chunk, numbers)), spans, forms
    )


def token_log_p(model, ids) -> np.ndarray:
    """log p(ids[t] | ids[:t]) for each t but the first, float32 [n_ids - 1]."""
    import torch  # here: data/lib/report.py does without
    from torch.nn.functional import cross_entropy

    with torch.inference_mode():
        ids = torch.as_tensor(ids, device=model.embed_tokens.weight.device)
        found = []
        blocks = model(ids[None, :-1])[0].split(256), ids[1:].split(256)
        for hidden, targets in zip(*blocks):
            logits = model.logits(hidden).float()  # [256, n_vocab]
            found.append(-cross_entropy(logits, targets, reduction="none"))
        return torch.cat(found).cpu().numpy()


def for_people(
    model, corpus: Corpus, numbers, got, weights, ess, is_first: bool
) -> dict:
    """A part's share of examples.txt and shown.npz, as arrays.

    got: Samples of the chunks `numbers`, as in describe. Which chunks are kept
    depends on nothing but the corpus, so every round has the same.
    """
    kept = np.flatnonzero(
        hash_uniform(SHOWN, numbers) * corpus.n_chunks < CHUNKS
    )
    thoughts = got.thoughts[kept]  # [m, K]
    chosen = map(got.chosen, range(len(numbers)))
    picked = {int(i): z for i, z in zip(numbers, chosen) if z is not None}
    docs = np.unique(corpus.doc_of(numbers))[: DOCUMENTS if is_first else 0]
    longest, log_p = min(LONGEST, model.config.seq_len), []
    for d in docs:
        for form in (PRIOR, POSTERIOR):
            ids, _ = as_trained(corpus, d, lambda i: picked.get(i, ()), form)
            log_p.append(token_log_p(model, ids[:longest]))
    shown = range(len(numbers))[: EXAMPLES if is_first else 0]
    examples = [
        describe(corpus, numbers[k], got, k, weights, ess) for k in shown
    ]
    nothing = np.zeros(0, dtype=np.int64)
    return {
        "examples": np.array(examples, dtype=str),
        "shown_chunks": numbers[kept],
        "shown_sizes": np.vectorize(len, otypes=[np.int64])(thoughts),
        "shown_ids": np.concatenate([nothing, *thoughts.ravel()]),
        "shown_docs": docs,
        "shown_lengths": np.array(list(map(len, log_p)), dtype=np.int64),
        "shown_log_p": np.concatenate([nothing, *log_p]).astype(np.float32),
    }


def write_for_people(folder: Path, arrays: dict) -> None:
    """examples.txt and shown.npz from what all parts have kept."""
    examples = "\n\n".join(arrays["examples"].tolist()) + "\n"
    (folder / "examples.txt").write_text(examples, encoding="utf-8")
    names = "chunks sizes ids docs lengths log_p".split()
    shown = {name: arrays[f"shown_{name}"] for name in names}
    np.savez_compressed(folder / "shown.npz", **shown)


# What np.load raises for a file that is no array, or a damaged one.
DAMAGE = (
    ValueError,
    EOFError,
    OSError,
    TypeError,
    IndexError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(path: Path) -> dict:
    """All arrays; {} if there is no file. UserError for a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        return {}
    except DAMAGE as e:
        raise UserError(
            f"{path}: damaged ({e}); make the folder again"
        ) from None


class Round(NamedTuple):
    """What a thoughts folder says of some chunks."""

    thoughts: Thoughts
    samples: dict  # {chunk: its row of all of samples.npz, and its thoughts}
    log_p: dict  # {(document, form): log-probabilities of its tokens}


def read_rounds(
    corpus: Corpus, folders: list[Path]
) -> tuple[list[int], list[Round]]:
    """(chunks to be shown of all folders, shuffled; the folders).

    A teacher's folder has no shown.npz, just thoughts.
    """
    rounds, able = [], ~corpus.questions
    for folder in folders:
        thoughts, samples, log_p = open_thoughts(folder, corpus), {}, {}
        here = np.diff(thoughts.chunks) > 0
        if shown := read_npz(folder / "shown.npz"):
            here = np.isin(np.arange(corpus.n_chunks), shown["chunks"])
            arrays = read_npz(folder / "samples.npz")
            each = iter(cut(shown["ids"], shown["sizes"]))
            for i, sizes in zip(shown["chunks"].tolist(), shown["sizes"]):
                samples[i] = {key: x[i] for key, x in arrays.items()}
                samples[i]["thoughts"] = [next(each) for _ in sizes]
            forms = [
                (d, form) for d in shown["docs"] for form in (PRIOR, POSTERIOR)
            ]
            log_p = dict(zip(forms, cut(shown["log_p"], shown["lengths"])))
        able &= here
        rounds.append(Round(thoughts, samples, log_p))
    chunks = np.random.default_rng(0).permutation(np.flatnonzero(able))[:CHUNKS]
    return chunks.tolist(), rounds


def cut(values: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """values in pieces of these sizes."""
    return np.split(values, np.cumsum(sizes))[:-1]


def worth_a_look(chunks: list[int], rounds: list[Round], n: int) -> dict:
    """n of the chunks: {why: chunks}. The gain is the heaviest thought's."""
    gains = {}
    for i, s in rounds[-1].samples.items():
        gains[i] = s["log_x"][s["log_w"].argmax()] - s["log_none"]
    able = [i for i in chunks if np.isfinite(gains.get(i, np.nan))]
    ranked = sorted(able, key=gains.get)
    picks = {i: {r.thoughts.span(i).tobytes() for r in rounds} for i in chunks}
    wishes = {
        "their pick changed": [i for i in chunks if len(picks[i]) > 1],
        "largest gains of the last round": ranked[::-1],
        "smallest gains of the last round": ranked,
        "at random": chunks,
    }
    found, taken = {}, set()
    for why, wish in wishes.items():
        most = n - len(taken) if wish is chunks else n // 4
        found[why] = [i for i in wish if i not in taken][:most]
        taken |= set(found[why])
    return {why: some for why, some in found.items() if some}


def describe(corpus: Corpus, i: int, got, row: int, weights, ess) -> str:
    """Chunk i with its K thoughts, their numbers and the pick, for a terminal.

    got: Samples (infer_thoughts.py) with the chunk in this row, as in weights
    [n, K] and ess [n].
    """
    before = "".join(map(corpus.text, corpus.before(i, 1)))
    said = (
        f"log p(x | c, no thought) {got.log_none[row]:.3f} | ess {ess[row]:.2f}"
    )
    lines = [
        f"chunk {i} | before: {before!r} | text: {corpus.text(i)!r} | {said}"
    ]
    for k, thought in enumerate(got.thoughts[row]):
        names = "log_q", "log_p", "log_w", "gain"
        figures = (
            f"{name} {getattr(got, name)[row, k]:8.3f}" for name in names
        )
        mark = "->" if k == got.pick[row] else "  "
        cut = "" if got.finished[row, k] else " (cut off)"
        text = corpus.tokenizer.decode(thought, first=False)
        weight = f"weight {weights[row, k]:.3f}"
        lines.append(f"  {mark} {' '.join(figures)} {weight} | {text!r}{cut}")
    return "\n".join(lines)


def report(meta: dict) -> str:
    """meta.json in a few lines."""
    m = SimpleNamespace(**meta)
    least = f"{m.min_gain:g}" if m.min_gain > LEAST else "-inf"
    lines = [
        f"{m.n_inferred} chunks, {m.samples} thoughts each, {m.sampled_tokens:,} tokens",
        f"cut off {m.cut_off} ({m.cut_off_share:.1%}), chunks with all cut off "
        f"{m.all_cut_off}, picks dropped for a gain below {least} nats "
        f"{m.no_gain}, empty picks {m.empty_picks}",
    ]
    if m.gain is None:
        lines.append(
            "no thought ended: train the model longer, or raise --max_new"
        )
    else:
        picked = "-" if m.gain_picked is None else f"{m.gain_picked:.2f}"
        lines += [
            f"ess {m.ess:.2f} of {m.samples}, entropy of weights {m.weight_entropy:.3f}"
            f" nats; a uniform choice changes {m.pick_not_uniform:.1%} of the picks",
            "gain of a thought, log p(x|c,z) - log p(x|c, no thought): "
            f"{m.gain:.2f} nats, of the picked {picked}",
        ]
    lengths = [f"{size}: {n}" for size, n in m.lengths.items() if n]
    bounds = {f"K={k}": x for k, x in m.nll_bound.items()}
    bounds |= {"no thought": m.nll_thoughtless, "no marker": m.nll_alone}
    shown = [f"{name} {x:.4f}" for name, x in bounds.items()]
    lines += [
        f"tokens a thought: {', '.join(lengths)}",
        f"bound of -log p, nats a byte: {', '.join(shown)}",
        f"checked against the slow function on {m.checked['chunks']} chunks, within "
        f"{max(m.checked['log_q'], m.checked['log_p']):.1e} nats a token",
    ]
    return "\n".join(lines)


def show(folder, n: int) -> None:
    """Print the first n chunks of a thoughts folder with all their thoughts."""
    text = (Path(folder) / "examples.txt").read_text(encoding="utf-8")
    if n:
        print("\n" + "\n\n".join(text.rstrip().split("\n\n")[:n]))
