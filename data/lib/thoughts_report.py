"""What an E-step tells people: a report of meta.json, and chunks with their thoughts.

shown.npz holds what only the E-step knows and data/lib/report.py draws:

    chunks [m], sizes [m, K], ids      all thoughts of some chunks, end to end
    docs [d], lengths [d, 2], log_p    documents in both forms, see as_trained: the
                                       model's log-probability of each token but the first
"""

import math
import zipfile
import zlib
from pathlib import Path
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
# In shown.npz: chunks, about; documents, and their longest and all of them in tokens.
CHUNKS, DOCUMENTS, LONGEST, ALL = 2000, 8, 1024, 4096
SHOWN = 7  # a first key of hash_uniform, as in data/lib/corpus.py


def as_trained(corpus: Corpus, d: int, span, form: int):
    """layout() of document d as training writes it, with all its thoughts in one form.

    span(i): the thought of chunk i. Of a long document only the begin.
    """
    first, last = corpus.docs[d], corpus.docs[d + 1]
    starts = corpus.chunks[first:last] - corpus.chunks[first]
    numbers = range(first, first + int((starts < LONGEST).sum()))
    chunks = [corpus.chunk(i)[:LONGEST] for i in numbers]
    spans = [span(i) for i in numbers]
    forms = [form if len(z) else RAW for z in spans]
    return layout(corpus.tokenizer, chunks, spans, forms)


def token_log_p(model, ids) -> np.ndarray:
    """log p(ids[t] | ids[:t]) for each t but the first, float32 [n_ids - 1]."""
    import torch  # here: data/lib/report.py does without

    with torch.inference_mode():
        ids = torch.as_tensor(ids, device=model.embed_tokens.weight.device)
        found = []
        blocks = model(ids[None, :-1])[0].split(256), ids[1:].split(256)
        for hidden, targets in zip(*blocks):
            log_p = model.logits(hidden).float().log_softmax(dim=-1)  # [256, n_vocab]
            found.append(log_p.gather(1, targets[:, None])[:, 0])
        return torch.cat(found).cpu().numpy()


def for_people(model, corpus: Corpus, numbers, got, weights, ess, is_first: bool) -> dict:
    """A part's share of examples.txt and shown.npz, as arrays.

    got: Samples of the chunks `numbers`, as in describe. Which chunks are kept
    depends on nothing but the corpus, so every round has the same.
    """
    kept = np.flatnonzero(hash_uniform(SHOWN, numbers) * corpus.n_chunks < CHUNKS)
    thoughts = list(got.thoughts[kept].ravel())
    sizes = np.array(list(map(len, thoughts)), dtype=np.int64)
    picked = {}
    for row, i in enumerate(numbers):
        thought = got.chosen(row)
        picked[int(i)] = () if thought is None else thought
    docs = np.unique(corpus.doc_of(numbers))[: DOCUMENTS if is_first else 0]
    nothing = np.zeros(0, dtype=np.int64)
    longest, log_p = min(LONGEST, model.config.seq_len), [nothing]
    for d in docs:
        if sum(map(len, log_p)) > ALL:
            break
        for form in (PRIOR, POSTERIOR):
            ids, _ = as_trained(corpus, d, lambda i: picked.get(i, ()), form)
            log_p.append(token_log_p(model, ids[:longest]))
    shown = range(len(numbers))[: EXAMPLES if is_first else 0]
    examples = [describe(corpus, numbers[k], got, k, weights, ess) for k in shown]
    lengths = np.array(list(map(len, log_p[1:])), dtype=np.int64)
    return {
        "examples": np.array(examples, dtype=str),
        "shown_chunks": numbers[kept],
        "shown_sizes": sizes.reshape(got.thoughts[kept].shape),
        "shown_ids": np.concatenate([nothing, *thoughts]),
        "shown_docs": docs[: len(log_p) // 2],
        "shown_lengths": lengths.reshape(-1, 2),
        "shown_log_p": np.concatenate(log_p).astype(np.float32),
    }


def write_for_people(folder: Path, arrays: dict) -> None:
    """examples.txt and shown.npz from what all parts have kept."""
    examples = "\n\n".join(arrays["examples"].tolist()) + "\n"
    (folder / "examples.txt").write_text(examples, encoding="utf-8")
    names = [name for name in arrays if name.startswith("shown_")]
    shown = {name.removeprefix("shown_"): arrays[name] for name in names}
    np.savez_compressed(folder / "shown.npz", **shown)


# What np.load raises for a file that is no array, or a damaged one.
DAMAGE = ValueError, EOFError, OSError, TypeError, IndexError, zipfile.BadZipFile, zlib.error


class Round(NamedTuple):
    """What a thoughts folder says of some chunks; an old one, or a teacher's, says less."""

    name: str
    thoughts: Thoughts
    samples: dict  # {array of samples.npz: a row for each of the chunks}
    row: dict  # {chunk: its row}
    drawn: dict  # {chunk: its K thoughts}
    log_p: dict  # {(document, form): log-probabilities of its tokens}


def read_npz(path: Path, rows=slice(None)) -> dict:
    """These rows of all arrays; {} if there is no file. UserError for a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name][rows] for name in file.files}
    except FileNotFoundError:
        return {}
    except DAMAGE as e:
        raise UserError(f"{path}: damaged ({e}); make the folder again") from None


def read_rounds(corpus: Corpus, folders: list[Path]) -> list[Round]:
    """The same chunks of all folders: those whose thoughts were kept, or any."""
    kept = [read_npz(folder / "shown.npz") for folder in folders]
    known = [set(k["chunks"].tolist()) for k in kept if k]
    both = sorted(set.intersection(*known)) if known else []
    numbers = np.array(both, dtype=np.int64)
    if not len(numbers):
        full = np.diff(corpus.chunks) > 0
        able = np.flatnonzero(~corpus.questions & full)
        some = np.random.default_rng(0).permutation(able)[:CHUNKS]
        numbers = np.sort(some)
    row = {int(i): n for n, i in enumerate(numbers)}
    rounds = []
    for folder, k in zip(folders, kept):
        thoughts, drawn, log_p = open_thoughts(folder, corpus), {}, {}
        if k:
            each = pieces(k["ids"], k["sizes"].ravel())
            n = k["sizes"].shape[1]
            for j, i in enumerate(k["chunks"].tolist()):
                drawn[i] = each[n * j : n * (j + 1)]
            docs = k["docs"].tolist()
            forms = [(d, form) for d in docs for form in (PRIOR, POSTERIOR)]
            log_p = dict(zip(forms, pieces(k["log_p"], k["lengths"].ravel())))
        by = Path(str(thoughts.meta.get("model", ""))).name
        name = f"{folder.name}, by {by}" if by else folder.name
        samples = read_npz(folder / "samples.npz", numbers)
        rounds.append(Round(name, thoughts, samples, row, drawn, log_p))
    return rounds


def pieces(values: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """values cut into pieces of these sizes."""
    return np.split(values, np.cumsum(sizes)[:-1]) if len(sizes) else []


def worth_a_look(rounds: list[Round], n: int) -> dict[str, list[int]]:
    """n chunks of the rounds, each once: {why: chunks}. The heaviest thought's gain counts."""
    order = np.random.default_rng(0).permutation(list(rounds[0].row)).tolist()
    spans = {i: {r.thoughts.span(i).tobytes() for r in rounds} for i in order}
    samples, gains = rounds[-1].samples, {}
    if samples:
        some = np.arange(len(order))
        best = np.argmax(samples["log_w"], axis=1)
        gain = samples["log_x"][some, best] - samples["log_none"]
        gains = {i: gain[rounds[-1].row[i]] for i in order}
    ended = (i for i in gains if math.isfinite(gains[i]))
    ranked = sorted(ended, key=gains.get)
    wishes = {
        "the pick changed between the rounds": [i for i in order if len(spans[i]) > 1],
        "the largest gains of the last round": ranked[::-1],
        "the smallest gains of the last round": ranked,
        "at random": sorted(order, key=lambda i: spans[i] == {b""}),
    }
    found, taken = {}, set()
    for left, (why, wish) in zip((4, 3, 2, 1), wishes.items()):
        mine = [i for i in wish if i not in taken][: (n - len(taken)) // left]
        taken |= set(mine)
        found |= {why: mine} if mine else {}
    return found


def describe(corpus: Corpus, i: int, got, row: int, weights, ess) -> str:
    """Chunk i with its K thoughts, their numbers and the pick, for a terminal.

    got: Samples (infer_thoughts.py) with the chunk in this row, as in weights
    [n, K] and ess [n].
    """
    tok = corpus.tokenizer
    before = "".join(map(corpus.text, corpus.before(i, 1)))
    text = corpus.text(i)
    lines = [
        f"chunk {i} | before: {before!r} | text: {text!r} | log p(x | c, no thought) "
        f"{got.log_none[row]:.3f} | ess {ess[row]:.2f}"
    ]
    for k, thought in enumerate(got.thoughts[row]):
        mark = "->" if k == got.pick[row] else "  "
        cut = "" if got.finished[row, k] else " (cut off)"
        lines.append(
            f"  {mark} log_q {got.log_q[row, k]:8.3f} log_p {got.log_p[row, k]:8.3f} "
            f"log_w {got.log_w[row, k]:8.3f} gain {got.gain[row, k]:7.3f} "
            f"weight {weights[row, k]:.3f} | {tok.decode(thought, first=False)!r}{cut}"
        )
    return "\n".join(lines)


def report(meta: dict) -> str:
    """meta.json in a few lines."""
    least = meta["min_gain"] if meta["min_gain"] > LEAST else -math.inf
    lines = [
        f"{meta['n_inferred']} chunks, {meta['samples']} thoughts each, "
        f"{meta['sampled_tokens']:,} tokens; cut off {meta['cut_off']} "
        f"({meta['cut_off_share']:.1%}), chunks with all cut off {meta['all_cut_off']}, "
        f"picks dropped for a gain below {least:g} nats {meta['no_gain']}, "
        f"empty picks {meta['empty_picks']}"
    ]
    if meta["gain"] is None:
        lines.append("no thought ended: raise --max_new, or train the model longer")
    else:
        picked = "-" if meta["gain_picked"] is None else f"{meta['gain_picked']:.2f}"
        lines += [
            f"ess {meta['ess']:.2f} of {meta['samples']}, entropy of weights "
            f"{meta['weight_entropy']:.3f} nats; a uniform choice would change "
            f"{meta['pick_not_uniform']:.1%} of the picks",
            "gain of a thought, log p(x|c,z) - log p(x|c, no thought): "
            f"{meta['gain']:.2f} nats, of the picked {picked}",
        ]
    lengths = [f"{size}: {n}" for size, n in meta["lengths"].items() if n]
    per_chunk = meta["nll_bound_chunk"]
    bounds = [f"K={k} {v:.4f} ({per_chunk[k]:.3f})" for k, v in meta["nll_bound"].items()]
    bounds += [
        f"{name} {meta[key]:.4f} ({meta[f'{key}_chunk']:.3f})"
        for name, key in (("no thought", "nll_thoughtless"), ("no marker", "nll_alone"))
    ]
    checked = meta["checked"]
    lines += [
        "tokens a thought: " + ", ".join(lengths),
        "bound of -log p, nats a byte (a chunk): " + ", ".join(bounds),
        f"checked against the slow function on {checked['chunks']} chunks: log_q within "
        f"{checked['log_q']:.1e}, log_p within {checked['log_p']:.1e} nats a token; over a "
        f"thought within {checked['log_q_sum']:.1e} and {checked['log_p_sum']:.1e} nats times "
        "the root of its tokens",
    ]
    return "\n".join(lines)


def show(folder, n: int) -> None:
    """Print the first n chunks of a thoughts folder with all their thoughts."""
    if n:
        text = (Path(folder) / "examples.txt").read_text(encoding="utf-8")
        chunks = text.rstrip().split("\n\n")
        print("\n" + "\n\n".join(chunks[:n]))
