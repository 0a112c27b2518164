"""GSM8K, few-shot, greedy, raw: our responses beside those of transformers' generate.

    python tests/bench_eval.py --model=FOLDER --file=gsm8k/test.jsonl --problems=100
        --n_shots=4 --max_new=256 [--batch=16]

FOLDER has marker tokens (train.py --init_from=... --max_steps=0). transformers gets the
same prompt strings and weights: its own tokenizer's ids of the strings behind BOS,
prompts of like length together, padded on the left, --batch at a time. It stops at the
same strings, looked for every 8 tokens, as ours. Printed: how many responses have the
same tokens, both scores, wall times, and where responses differ, how far apart the two
likeliest tokens are there.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.lib.engine import Engine, Sampling
from data.lib.grader import grade
from eval_math import END, Settings, benchmark_problems
from train import load_model


def ours(model, tok, problems, stop, max_new):
    def ends(ids):
        return bool(END.search(tok.decode(ids[-48:])))

    sampling = Sampling(max_new, frozenset(stop), temperature=0.0)
    prompts = [p.prompt for p in problems]
    keys = [p.key for p in problems]
    drawn = Engine(model).generate(prompts, keys, 1, sampling, ends=ends)
    return [[int(t) for t in ids] for [(ids, _, _)] in drawn]


def stopping(tok, width: int):
    """transformers' criterion: every 8 tokens, whether a response of a batch has a stop string."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Ends(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if (input_ids.shape[1] - width) % 8:
                return torch.zeros(len(input_ids), dtype=torch.bool)
            last = [row[max(width, len(row) - 48) :].tolist() for row in input_ids]
            return torch.tensor([bool(END.search(tok.decode(ids))) for ids in last])

    return StoppingCriteriaList([Ends()])


def theirs(folder, texts, tok, stop, max_new, batch):
    """(ids of the prompts, ids of the responses, seconds)"""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    prompts = []
    for text in texts:
        prompts.append([tok.bos, *reference.encode(text, add_special_tokens=False).ids])
    results = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    begin = time.time()
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        width = max(len(prompts[i]) for i in chosen)
        pads = [width - len(prompts[i]) for i in chosen]
        ids = [[tok.eos] * pad + prompts[i] for i, pad in zip(chosen, pads)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        out = model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=max_new,
            do_sample=False,
            eos_token_id=sorted(stop),
            pad_token_id=tok.eos,
            stopping_criteria=stopping(tok, width),
        )
        for i, row in zip(chosen, out[:, width:].tolist()):
            results[i] = row
    return prompts, results, time.time() - begin


def cut(row: list[int], stop: set[int], tok) -> list[int]:
    """A row of generate without its padding.

    It ends with its first stop token, or at the check after which it had a stop string.
    """
    end = next((i + 1 for i, t in enumerate(row) if t in stop), len(row))
    for n in range(8, end, 8):
        if END.search(tok.decode(row[max(0, n - 48) : n])):
            return row[:n]
    return row[:end]


def report_difference(model, p, a: list[int], b: list[int]) -> None:
    pairs = enumerate(zip(a, b))
    at = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
    ids = torch.tensor([[*p.prompt.tolist(), *a[:at]]])
    with torch.inference_mode():
        top = model.logits(model(ids)[0, -1]).topk(2).values
    gap = f"the two likeliest are {float(top[0] - top[1]):.1e} apart there"
    print(f"problem {p.key}: differs at token {at} of {len(a)} and {len(b)}; {gap}")


def main() -> None:
    flags = {"problems": 100, "max_new": 256, "batch": 16, "n_shots": 4}
    flags |= dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
    n, max_new, batch = (int(flags[name]) for name in ("problems", "max_new", "batch"))
    model, tok = load_model(flags["model"])
    s = Settings(
        out_dir="",
        benchmark="gsm8k",
        file=flags["file"],
        mode="raw",
        n_shots=int(flags["n_shots"]),
        limit=n,
        max_new=max_new,
    )
    problems, _ = benchmark_problems(s, tok, model.config.seq_len)
    stop = {tok.eos, tok.sol, tok.eol}
    begin = time.time()
    mine = ours(model, tok, problems, stop, max_new)
    our_seconds = time.time() - begin
    texts = [tok.decode(p.prompt[1:]) for p in problems]
    prompts, others, seconds = theirs(flags["model"], texts, tok, stop, max_new, batch)
    others = [cut(row, stop, tok) for row in others]

    def n_right(rows) -> int:
        texts = [tok.decode([t for t in ids if t not in stop]) for ids in rows]
        return sum(grade(text, p.gold) for text, p in zip(texts, problems))

    same_prompts = sum(a == p.prompt.tolist() for a, p in zip(prompts, problems))
    lengths = [len(p) for p in prompts]
    print(
        f"{n} problems, {s.n_shots} examples, prompts of {min(lengths)} to {max(lengths)} tokens; "
        f"the same ids from the same strings: {same_prompts}"
    )
    same = sum(a == b for a, b in zip(mine, others))
    right = f"ours {n_right(mine)}, transformers {n_right(others)}"
    print(f"token-identical: {same} of {n}; right: {right}")
    print(
        f"seconds: ours {our_seconds:.0f}, transformers {seconds:.0f} ({batch} prompts a batch), "
        f"ratio {seconds / our_seconds:.2f}; tokens {sum(map(len, mine)):,}"
    )
    for p, a, b in zip(problems, mine, others):
        if a != b:
            report_difference(model, p, a, b)


if __name__ == "__main__":
    main()
