"""data/benchmarks.py: every published form of the four benchmarks becomes what eval_math.py reads."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SHARED, script

from data import benchmarks
from data.benchmarks import STEM, Settings, main, split_of
from data.lib import problems
from data.lib.cli import UserError

GSM8K = {"question": "How many are 2 and 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
MATH = {"problem": "What is $1+1$?", "level": "Level 2", "type": "Algebra", "solution": "It is $\\boxed{2}$."}
MATH500 = {
    "problem": "What is $1+2$?",
    "solution": "It is $3$.",
    "answer": "3",
    "subject": "Algebra",
    "level": 2,
    "unique_id": "x",
}
MMLU = {"question": "Which, é?", "subject": "astronomy", "choices": ["a", "b", "c", "d"], "answer": 2}


def put(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def get(out: Path, *words) -> dict[str, list[dict]]:
    """Run it; {"gsm8k/test": rows}."""
    main(Settings(benchmarks=list(map(str, words)), out_dir=str(out)))
    found = {
        f"{path.parent.name}/{path.stem}": [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(out.rglob("*.jsonl"))
    }
    for path in out.rglob("*.jsonl"):
        problems.read_items(path)  # nothing is written that it refuses
    assert not list(out.rglob("*.tmp"))
    return found


def test_gsm8k_folder(tmp_path, capsys):
    for name in ("train", "test", "train_socratic", "example_model_solutions"):
        put(tmp_path / f"in/grade_school_math/data/{name}.jsonl", GSM8K | {"question": name})
    found = get(tmp_path / "out", f"gsm8k={tmp_path / 'in'}")
    assert {k: [row["question"] for row in rows] for k, rows in found.items()} == {
        "gsm8k/train": ["train"],
        "gsm8k/test": ["test"],
    }
    out = capsys.readouterr().out
    assert (
        "test.jsonl: 1 problems, 1,319 were published" in out and "left out: 2 files of neither split" in out
    )
    assert get(tmp_path / "out", f"gsm8k={tmp_path / 'in'}") == found, "the same again is no error"
    with pytest.raises(UserError, match=r"train\.jsonl: is there with other problems; remove it"):
        get(tmp_path / "out", f"gsm8k.train={tmp_path / 'in/grade_school_math/data/test.jsonl'}")


def test_math_as_a_file_a_problem(tmp_path, monkeypatch):
    for split, n in (("train", 12), ("test", 11)):
        for i in range(n):
            put(tmp_path / f"MATH/{split}/algebra/{i}.json", MATH | {"problem": f"{split} {i}"})
    put(tmp_path / "MATH/test/geometry/3.json", MATH | {"problem": "a triangle"})
    found = get(tmp_path / "out", f"math={tmp_path / 'MATH'}")
    assert [row["problem"] for row in found["math/test"]] == [
        *(f"test {i}" for i in range(11)),
        "a triangle",
    ], "2.json before 10.json"
    assert len(found["math/train"]) == 12 and found["math/train"][0] == MATH | {"problem": "train 0"}
    monkeypatch.chdir(tmp_path / "MATH")
    assert get(tmp_path / "part", "math=test") == {"math/test": found["math/test"]}, (
        "the folder's own name counts"
    )


def test_lists_and_jsonl_under_the_name_json(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps([MATH500, MATH500]))
    put(tmp_path / "train.json", MATH, MATH)
    assert {k: len(v) for k, v in get(tmp_path / "out", f"math={tmp_path}").items()} == {
        "math/test": 2,
        "math/train": 2,
    }


def test_math500_needs_a_split(tmp_path):
    path = put(tmp_path / "sample.jsonl", MATH500)
    with pytest.raises(UserError, match=r"neither train nor test; say which by math500\.test="):
        get(tmp_path / "out", f"math500={path}")
    assert get(tmp_path / "out", f"math500.test={path}") == {"math500/test": [MATH500]}


def test_mmlu_csv_keeps_stem(tmp_path, capsys):
    for folder in ("dev", "test", "val"):
        for subject in ("astronomy", "high_school_physics", "anatomy"):
            path = tmp_path / f"data/{folder}/{subject}_{folder}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'"Which, of\n{subject}, é?",one,"two, ""2""",three,4,C\n', encoding="utf-8")
    (tmp_path / "data/auxiliary_train").mkdir()
    (tmp_path / "data/auxiliary_train/arc_easy.csv").write_text("q,a,b,c,d,A\n")
    found = get(tmp_path / "out", f"mmlu_stem={tmp_path / 'data'}")
    assert {k: [row["subject"] for row in rows] for k, rows in found.items()} == dict.fromkeys(
        ("mmlu_stem/test", "mmlu_stem/train"), ["astronomy", "high_school_physics"]
    )
    assert found["mmlu_stem/test"][0] == {
        "question": "Which, of\nastronomy, é?",
        "subject": "astronomy",
        "choices": ["one", 'two, "2"', "three", "4"],
        "answer": 2,
    }
    out = capsys.readouterr().out
    assert "left out: 2 questions of other subjects" in out and "4 files of neither split" in out
    assert len(set(STEM)) == 18 and not any(a != b and a in b for a in STEM for b in STEM)


def test_damaged_csv(tmp_path):
    for raw, message in (
        (b'"q",a,b,c,d,BC\n', "test.csv:1: field .answer. names none"),
        (b'"caf\xe9",a,b,c,d,A\n', "not a csv file in UTF-8"),
        (b'"' + b"x" * 200_000, "not a csv file"),
    ):
        (tmp_path / "astronomy_test.csv").write_bytes(raw)
        with pytest.raises(UserError, match=message):
            get(tmp_path / "out", f"mmlu_stem={tmp_path / 'astronomy_test.csv'}")


def test_mmlu_parquet(tmp_path):
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "all").mkdir()
    parquet.write_table(
        pa.Table.from_pylist([MMLU, MMLU | {"subject": "world_religions"}]),
        tmp_path / "all/test-00000-of-00001.parquet",
    )
    assert get(tmp_path / "out", f"mmlu_stem={tmp_path}") == {"mmlu_stem/test": [MMLU]}
    (tmp_path / "all/test-00000-of-00001.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="not a parquet file"):
        get(tmp_path / "out2", f"mmlu_stem={tmp_path}")


def test_the_rules_are_those_of_eval_math():
    changes = [
        {"question": None},
        {"question": " "},
        {"answer": ""},
        {"answer": None},
        {"answer": True},
        {"answer": 3},
        {"answer": 4},
        {"answer": -1},
        {"answer": "A"},
        {"answer": "E"},
        {"answer": "#### "},
        {"answer": "AB"},
        {"answer": 2.5},
        {"answer": [1]},
        {"choices": "abcd"},
        {"choices": []},
        {"choices": ["a"]},
        {"choices": list("abcdefghijk")},
        {"solution": "$\\boxed{}$"},
        {"solution": "no answer"},
        {"solution": 3},
        {"solution": None},
        {"problem": "p"},
        {"answer": None, "solution": "It is 5."},
    ]
    n_good = 0
    for row in [base | change for base in (GSM8K, MATH, MATH500, MMLU) for change in ({}, *changes)]:
        try:
            problems.read_item(row)
            taken = True
        except ValueError:
            taken = False
        n_good += taken
    assert n_good == 45
    for row in (GSM8K, MATH, MATH500, MMLU):
        assert problems.checked(row) is row


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path):
    for row, message in (
        (GSM8K | {"answer": "#### "}, "test.jsonl:2: field"),
        ([1], "test.jsonl:2: expected a JSON object"),
    ):
        put(tmp_path / "in/test.jsonl", GSM8K, row)
        with pytest.raises(UserError, match=message):
            get(tmp_path / "out", f"gsm8k={tmp_path / 'in'}")
    (tmp_path / "in/test.jsonl").write_text('{"question": \n')
    for words, message in (
        ([f"gsm8k={tmp_path / 'in'}"], "test.jsonl:1: "),
        (["gsm9k"], "expected gsm8k"),
        (["gsm8k.test"], "expected gsm8k"),
        (["math.dev=x"], "expected gsm8k"),
        (["math=/no/such"], "no such file or folder"),
        ([f"math={tmp_path / 'out'}"], "no such file|holds no"),
    ):
        with pytest.raises(UserError, match=message):
            get(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_fetching(tmp_path, monkeypatch, capsys):
    asked = []

    def snapshot_download(repo, repo_type, allow_patterns):
        asked.append((repo, repo_type, allow_patterns))
        put(tmp_path / "hub/test.jsonl", MATH500)
        return str(tmp_path / "hub")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert get(tmp_path / "out", "math500") == {"math500/test": [MATH500]} and asked == [
        ("HuggingFaceH4/MATH-500", "dataset", ["test.jsonl"])
    ]
    get(tmp_path / "out", "math500")
    assert len(asked) == 1 and "there already" in capsys.readouterr().out

    def fails(*_, **__):
        raise ConnectionError("no\nroute")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fails))
    with pytest.raises(
        UserError, match=r"openai/gsm8k: not fetched \(ConnectionError: no route\); .* gsm8k=FOLDER$"
    ):
        get(tmp_path / "out", "all")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError,
        match="cais/mmlu: fetching needs huggingface_hub; pip install huggingface_hub, or name files",
    ):
        get(tmp_path / "out", "mmlu_stem")


def test_the_names_of_splits():
    for name, of in {
        "train.jsonl": "train",
        "main/test-00000-of-00001.parquet": "test",
        "test/algebra/train.json": "train",
        "a/dev/x.csv": "train",
        "val/x_val.csv": "",
        "auxiliary_train.parquet": "",
        "socratic/train.jsonl": "",
        "latest/attest.jsonl": "",
        "train/test_train.jsonl": "",
        "validation/test/x": "test",
    }.items():
        assert split_of(Path(name)) == of, name


def test_module_and_folder_share_a_name(tmp_path):
    for folder in (tmp_path / "data/benchmarks/gsm8k",):
        put(folder / "test.jsonl", GSM8K)
    (tmp_path / "data/__init__.py").touch()
    (tmp_path / "data/benchmarks.py").write_text("HERE = 1\n")
    finder = importlib.machinery.PathFinder.find_spec("data.benchmarks", [str(tmp_path / "data")])
    assert finder.origin == str(tmp_path / "data/benchmarks.py"), (
        "the module wins over a folder without __init__.py"
    )
    assert (
        Settings(benchmarks=[]).out_dir == str(ROOT / "data/benchmarks") == str(problems.DATA / "benchmarks")
    )
    assert (
        Path(benchmarks.__file__) == ROOT / "data/benchmarks.py"
        and "data/benchmarks/" in (ROOT / ".gitignore").read_text().split()
    )


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
def test_real_files_at_the_command_line(tmp_path):
    data = SHARED / "data"
    words = [
        f"gsm8k={data / 'gsm8k'}",
        f"math500.test={data / 'math'}",
        f"mmlu_stem.test={data / 'mmlu_stem'}",
    ]
    out = script("data/benchmarks.py", *words, f"--out_dir={tmp_path}").stdout
    assert (
        out.count(" as published") == 2 and "mmlu_stem/test.jsonl: 302 problems, 3,018 were published" in out
    )
    for name, n in (("gsm8k", 1319), ("math500", 50), ("mmlu_stem", 302)):
        assert len(problems.read_items(tmp_path / name / "test.jsonl")) == n
    assert script("data/benchmarks.py", code=1).stderr.startswith(
        "benchmarks.py: error: BENCHMARK ... is required"
    )
