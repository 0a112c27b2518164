"""Gradings a second on one core, ours beside Math-Verify's, on the table of the tests (grades.jsonl).

    python tests/bench_grade.py                    # with Math-Verify where that is installed
    python tests/bench_grade.py --cases=my.jsonl   # lines of {"response", "gold", "right"}

The cases are graded one after the other, and nothing is kept from one to the
next: caches are emptied. Also printed: how many verdicts are right, and how
many wrong answers pass.
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

    def theirs(response: str, gold: str) -> bool:
        reference = parse(f"${gold}$", parsing_timeout=None)
        answer = parse(response, parsing_timeout=None)
        return bool(verify(reference, answer, timeout_seconds=None))

    return theirs


def measure(name: str, grader, cases: list[dict]) -> float:
    """Grade all cases, print what came of it. Returns the median of the seconds a case."""
    seconds = []
    right = 0
    passed = 0
    failed = 0
    for case in cases:
        begin = time.perf_counter()
        try:
            verdict = grader(case["response"], case["gold"])
        except Exception:  # the other library's: counted
            verdict = None
            failed += 1
        seconds.append(time.perf_counter() - begin)
        right += verdict == case["right"]
        passed += bool(verdict) and not case["right"]
    n_wrong = sum(not case["right"] for case in cases)
    median = statistics.median(seconds)
    mean = statistics.mean(seconds)
    print(
        f"{name:<12} median {median * 1e3:.3f} ms ({1 / median:,.0f}/s), mean {mean * 1e3:.3f} ms, "
        f"longest {max(seconds) * 1e3:.0f} ms | right {right / len(cases):.2%}, "
        f"wrong answers passed {passed / n_wrong:.2%}, exceptions {failed}",
        flush=True,
    )
    return median


def main() -> None:
    named = [a.split("=", 1)[1] for a in sys.argv[1:] if a.startswith("--cases=")]
    paths = named[0].split(",") if named else [Path(__file__).with_name("grades.jsonl")]
    cases = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            cases += [json.loads(line) for line in file]
    print(f"{len(cases)} cases, {sum(c['right'] for c in cases)} of them right")
    other = math_verify()
    for _ in range(2):  # alternating: the machine may be busy for a while
        ours_median = measure("ours", ours, cases)
        if other:
            theirs_median = measure("Math-Verify", other, cases)
            print(f"ratio of medians {theirs_median / ours_median:.1f}")
    if not other:
        print("Math-Verify is not installed")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
