"""GSM8K, few-shot, greedy, raw: eval_math.py's responses beside transformers' generate, with the same prompt strings and weights.

    python tests/bench_eval.py --model=FOLDER --file=gsm8k/test.jsonl --problems=100 --n_shots=4 --max_new=256 [--batch=16] [--prompts=out.jsonl]

FOLDER has marker tokens (train.py --init_from=... --max_steps=0). transformers gets its own tokenizer's ids of the same strings behind BOS, prompts of like
length together, padded on the left, `--batch` at a time, and stops at the same strings (looked at every 8 tokens, as ours). Printed: how many responses
have the same tokens, both scores, wall times. Where they differ, how far apart the two likeliest tokens were there.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.lib.engine import Engine
from data.lib.grader import grade
from eval_math import END, Settings, benchmark_problems
from train import load_model


def ours(model, tok, problems, stop, max_new):
    def ends(ids):
        return bool(END.search(tok.decode(ids[-48:])))

    drawn = Engine(model).generate([p.prompt for p in problems], [p.key for p in problems], 1, max_new, stop, 0, temperature=0.0, ends=ends)
    return [[int(t) for t in ids] for [(ids, _, _)] in drawn]


def theirs(folder, texts, tok, stop, max_new, batch):
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    prompts = [[tok.bos, *reference.encode(text, add_special_tokens=False).ids] for text in texts]
    results, order = [None] * len(prompts), sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    begin = time.time()
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[tok.eos] * (width - len(prompts[i])) + prompts[i] for i in chosen])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])

        class Ends(StoppingCriteria):
            def __call__(self, input_ids, scores, width=width, **kwargs):
                if (input_ids.shape[1] - width) % 8:
                    return torch.zeros(len(input_ids), dtype=torch.bool)
                return torch.tensor([bool(END.search(tok.decode(row[max(width, len(row) - 48) :].tolist()))) for row in input_ids])

        out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new, do_sample=False, eos_token_id=sorted(stop), pad_token_id=tok.eos,
                             stopping_criteria=StoppingCriteriaList([Ends()]))  # fmt: skip
        for i, row in zip(chosen, out[:, width:].tolist()):
            results[i] = row
    return prompts, results, time.time() - begin


def cut(row: list[int], stop: set[int], tok) -> list[int]:
    """A row of generate up to its first stop token, or to the check after which it had a stop string: what follows is padding."""
    end = next((i + 1 for i, t in enumerate(row) if t in stop), len(row))
    for n in range(8, end, 8):
        if END.search(tok.decode(row[max(0, n - 48) : n])):
            return row[:n]
    return row[:end]


def main() -> None:
    flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
    n, max_new, batch = int(flags.get("problems", 100)), int(flags.get("max_new", 256)), int(flags.get("batch", 16))
    model, tok = load_model(flags["model"])
    s = Settings(out_dir="", benchmark="gsm8k", file=flags["file"], mode="raw", n_shots=int(flags.get("n_shots", 4)), limit=n, max_new=max_new)
    problems, _ = benchmark_problems(s, tok, model.config.seq_len)
    stop = {tok.eos, tok.sol, tok.eol}
    begin = time.time()
    mine = ours(model, tok, problems, stop, max_new)
    our_seconds = time.time() - begin
    texts = [tok.decode(p.prompt[1:]) for p in problems]
    prompts, others, their_seconds = theirs(flags["model"], texts, tok, stop, max_new, batch)
    others = [cut(row, stop, tok) for row in others]
    same_prompts = sum(a == p.prompt.tolist() for a, p in zip(prompts, problems))
    same = [a == b for a, b in zip(mine, others)]
    scores = [sum(grade(tok.decode([t for t in ids if t not in stop]), p.gold) for ids, p in zip(rows, problems)) for rows in (mine, others)]
    print(f"{n} problems, {s.n_shots} examples, prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens; the same ids from the same strings: {same_prompts}")
    print(f"token-identical: {sum(same)} of {n}; right: ours {scores[0]}, transformers {scores[1]}")
    print(f"seconds: ours {our_seconds:.0f}, transformers {their_seconds:.0f} ({batch} prompts a batch), ratio {their_seconds / our_seconds:.2f}; tokens {sum(map(len, mine)):,}")
    for p, a, b in zip(problems, mine, others):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            with torch.inference_mode():
                logits = model.logits(model(torch.tensor([np.append(p.prompt, a[:at]).tolist()]))[0, -1])
            top = logits.topk(2).values
            print(f"problem {p.key}: differs at token {at} of {len(a)} and {len(b)}; the two likeliest are {float(top[0] - top[1]):.1e} apart there")


if __name__ == "__main__":
    main()
