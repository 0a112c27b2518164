"""Gradings a second on one core, ours beside Math-Verify's, on the table of the tests (grades.jsonl), one case after the other.

    python tests/bench_grade.py                    # Math-Verify where it is installed (pip install math-verify)
    python tests/bench_grade.py --cases=my.jsonl   # lines of {"response", "gold", "right"}

Nothing is kept from one case to the next: caches are emptied. Also printed: how many verdicts are right, and how many wrong answers pass.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.lib.grader import grade, readings


def ours(response: str, gold: str) -> bool:
    readings.cache_clear()
    return grade(response, gold)


def math_verify():
    """Math-Verify as its README uses it: the reference in dollar signs, the response as it is."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return None
    return lambda response, gold: bool(verify(parse(f"${gold}$", parsing_timeout=None), parse(response, parsing_timeout=None), timeout_seconds=None))


def measure(name: str, grader, cases: list[dict]) -> float:
    seconds, right, passed, failed = [], 0, 0, 0
    for c in cases:
        begin = time.perf_counter()
        try:
            verdict = grader(c["response"], c["gold"])
        except Exception:  # the other library's: counted
            verdict, failed = None, failed + 1
        seconds.append(time.perf_counter() - begin)
        right += verdict == c["right"]
        passed += bool(verdict) and not c["right"]
    n_wrong, median = sum(not c["right"] for c in cases), statistics.median(seconds)
    print(f"{name:<12} median {median * 1e3:.3f} ms ({1 / median:,.0f}/s), mean {statistics.mean(seconds) * 1e3:.3f} ms, longest {max(seconds) * 1e3:.0f} ms | "
          f"right {right / len(cases):.2%}, wrong answers passed {passed / n_wrong:.2%}, exceptions {failed}", flush=True)  # fmt: skip
    return median


def main() -> None:
    named = [a.split("=", 1)[1] for a in sys.argv[1:] if a.startswith("--cases=")]
    paths = named[0].split(",") if named else [Path(__file__).with_name("grades.jsonl")]
    cases = [json.loads(line) for path in paths for line in open(path, encoding="utf-8")]
    print(f"{len(cases)} cases, {sum(c['right'] for c in cases)} of them right")
    other, first = math_verify(), []
    for _ in range(2):  # alternating: the machine may be busy for a while
        first.append(measure("ours", ours, cases))
        if other:
            print(f"ratio of medians {measure('Math-Verify', other, cases) / first[-1]:.1f}")
    if not other:
        print("Math-Verify is not installed")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
