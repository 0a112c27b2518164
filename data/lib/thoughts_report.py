"""What an E-step tells people: a report of meta.json, and chunks with their thoughts."""

import math
from pathlib import Path

from data.lib.cli import LEAST
from data.lib.corpus import Corpus


def describe(corpus: Corpus, i: int, got, row: int, weights, ess) -> str:
    """Chunk i with its K thoughts, their numbers and the pick, for a terminal.

    got: Samples (infer_thoughts.py) with the chunk in this row, as in weights
    [n, K] and ess [n].
    """
    tok = corpus.tokenizer
    before = "".join(tok.decode(corpus.chunk(j)) for j in corpus.before(i, 1))
    text = tok.decode(corpus.chunk(i))
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
            f"weight {weights[row, k]:.3f} | {tok.decode(thought)!r}{cut}"
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
