"""The training of eval_math.py --finetune: a benchmark's training problems as a corpus.

`s` are the settings of eval_math.py.
"""

import shlex
from pathlib import Path

import numpy as np

from data.lib.cli import UserError, read_json, start
from data.lib.corpus import open_corpus, open_thoughts, write_corpus, write_thoughts
from data.lib.problems import Item, find_file, read_items
from data.lib.tokenizer import load_tokenizer


def training_problems(s) -> list[Item]:
    """Those with a solution that are not also tested; UserError when there is none."""
    path = find_file(s, "train")
    items = [item for item in read_items(path) if item.solution]
    tested = {item.question for item in read_items(find_file(s, "test"))}
    kept = [item for item in items if item.question not in tested]
    left_out = len(items) - len(kept)
    print(f"{len(kept)} training problems, {left_out} that are also tested left out")
    if not kept:
        raise UserError(f"{path}: no training problem with a solution")
    return kept


def write_training_data(s, items: list[Item], folder: Path) -> None:
    """folder/corpus and folder/thoughts: documents of a question and an answer.

    The solution is the answer's thought, or in raw mode its beginning.
    """
    tok = load_tokenizer(Path(s.model))
    source = {"maker": "eval_math.py"}
    documents, spans = [], []
    for x in items:
        if s.mode == "latent":
            answer, thought = x.answer_text, tok.encode_thought(x.solution)
        else:
            answer, thought = x.solution + x.answer_text, []
        documents.append([(x.question_text, True), (answer, False)])
        spans += [[], thought]
    write_corpus(folder / "corpus", documents, tok, source | {"mode": s.mode})
    corpus = open_corpus(folder / "corpus", tok)
    write_thoughts(folder / "thoughts", corpus, spans, {"source": source})


def training_flags(s, items: list[Item], folder: Path) -> dict:
    """Flags for train.py on what write_training_data has written; the first call writes it."""
    if not (folder / "thoughts" / "meta.json").exists():
        write_training_data(s, items, folder)
    corpus = open_corpus(folder / "corpus")
    thoughts = open_thoughts(folder / "thoughts", corpus)
    # The longest document, with room for BOS, EOS and the markers.
    sizes = np.diff(corpus.chunks[corpus.docs]) + np.diff(thoughts.chunks[corpus.docs])
    longest = int(sizes.max()) + 8
    config = read_json(Path(s.model) / "config.json")
    batch = min(64, len(items))
    steps = max(1, round(s.epochs * len(items) / batch))
    return {
        "corpus": folder / "corpus",
        "thoughts": folder / "thoughts",
        "init_from": s.model,
        "loss": "completion",
        "optimizer": "adamw",
        "lr": 1e-4,
        "weight_decay": 0.0,
        "batch_size": batch,
        "max_steps": steps,
        "warmup": max(1, steps // 20),
        "seq_len": min(longest, config.get("max_position_embeddings", longest)),
        "device": s.device,
    }


def run_train(folder: Path, flags: dict, more: str) -> None:
    """Run train.py, which finds a folder complete, goes on, or begins.

    more: further flags in one string, as in a shell.
    """
    for word in shlex.split(more):
        name, has_value, value = word.removeprefix("--").partition("=")
        flags[name] = value if has_value else "true"
    child = start("train.py", flags | {"out_dir": folder})
    command = shlex.join(["train.py", *child.args[2:]])
    print(f"$ python {command}", flush=True)
    if child.wait():
        raise UserError(
            f"{folder}: train.py ended with exit code {child.returncode} (see above); "
            "the same command goes on from there"
        )


def sum_up(name: str, values: list[float]) -> dict:
    """Mean and standard deviation of the seeds' values, also printed."""
    mean, deviation = float(np.mean(values)), None
    said = f"{name}: {mean:.4f}"
    if len(values) > 1:
        deviation = float(np.std(values, ddof=1))
        said += f" ± {deviation:.4f} (standard deviation of {len(values)} seeds)"
    print(said)
    return {"mean": mean, "sd": deviation, "seeds": values}
