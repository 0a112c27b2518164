"""The bars of the default run, over seeds: accuracy by iteration, K = 1 and 8 against 4, bounds, time and memory. About 40 minutes.

python tests/bench_em.py --out_dir=out/bench
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.cli import opt, run


@dataclass(kw_only=True)
class Settings:
    out_dir: str = opt(help="where the runs go")
    seeds: int = opt(3, "seeds 0 .. n-1")


def main(s: Settings) -> None:
    last = {}
    for samples in (4, 1, 8):
        for seed in range(s.seeds):
            out, begin = Path(s.out_dir) / f"samples{samples}-seed{seed}", time.time()
            command = [sys.executable, str(ROOT / "em.py"), f"--out_dir={out}", f"--samples={samples}", f"--seed={seed}"]
            log = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows = {r["name"]: r for r in json.loads((out / "results.json").read_text())["rows"]}
            accuracy = {k: r["accuracy"] for k, r in rows.items()}
            models = [rows[f"M{t}"] for t in range(4)]
            tightens = all(r["nll_bound"]["16"] < r["nll_bound"]["4"] < r["nll_bound"]["1"] for r in models)
            falls = all(a["nll_bound"][k] > b["nll_bound"][k] for a, b in zip(models, models[1:]) for k in ("1", "4", "16"))
            rises = all(a["accuracy"] < b["accuracy"] for a, b in zip(models, models[1:]))
            last.setdefault(samples, []).append(accuracy["M3"])
            print(f"K={samples} seed={seed} {accuracy} rises={rises} bound tightens={tightens} falls={falls} "
                  f"{time.time() - begin:.0f} s | {log.strip().splitlines()[-1]}", flush=True)  # fmt: skip
    print({k: sum(v) / len(v) for k, v in last.items()}, "mean M3 accuracy by K")


if __name__ == "__main__":
    run(main, Settings)
