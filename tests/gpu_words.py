"""The EM loop on real word problems, for tests/gpu.sh; and how its weights and data reach the machine.

    python tests/gpu_words.py --pack=/tmp/smollm2 [--data=../shared/data] [--out_dir=tests/gpu/weights]

writes the model folder and the problems into part-0, part-1 ... of at most 60 MB each and index.json, so
that each part fits into one call of a tool that carries 64 MiB. bf16 weights are stored in two planes: of
their high bytes (sign and exponent), which zlib makes less than half as long, and of their low bytes.
Nothing is lost. join() puts all together, and checks the hash of every file.
"""

import contextlib
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import queue
import shutil
import sys
import threading
import time
import traceback
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from gpu_report import Report, script, what_failed

from data.lib.cli import ROOT, UserError, opt, read_json, read_settings, replacing, run, start, write_json
from data.lib.presets import EM_PRESETS, PRESETS

PART_BYTES = 60_000_000
DATA = ("word/train.jsonl", "word/test.jsonl", "word/raw_more.jsonl", "gsm8k/train.jsonl", "gsm8k/test.jsonl")


@dataclass(kw_only=True)
class Settings:
    pack: str = opt(help="model folder whose weights are packed")
    data: str = opt(str(ROOT.parent / "shared/data"), "folder of word/ and gsm8k/, if there are any")
    out_dir: str = opt(str(ROOT / "tests/gpu/weights"), "where the parts go")
    part_bytes: int = opt(PART_BYTES, "size of a part", low=1)


# ---- packing


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def encode(raw: bytes, in_planes: bool) -> bytes:
    """The bytes of a file, shorter; in planes: first the odd bytes, shortened, then the even ones."""
    if not in_planes:
        return zlib.compress(raw, 6)
    high = zlib.compress(raw[1::2], 1)
    return len(high).to_bytes(8, "little") + high + raw[0::2]


def decode(packed: bytes, in_planes: bool) -> bytes:
    if not in_planes:
        return zlib.decompress(packed)
    end = 8 + int.from_bytes(packed[:8], "little")
    high, low = zlib.decompress(packed[8:end]), packed[end:]
    raw = bytearray(len(high) + len(low))
    raw[1::2], raw[0::2] = high, low
    return bytes(raw)


def files_to_pack(s: Settings) -> dict[str, Path]:
    """{name in the pack: file}; UserError unless the model folder is whole."""
    folder = Path(s.pack)
    files = {f"model/{path.name}": path for path in sorted(folder.glob("*")) if path.is_file()}
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if f"model/{name}" not in files:
            raise UserError(f"--pack={folder}: {name} is missing; expected a model folder")
    found = {f"data/{name}": Path(s.data) / name for name in DATA}
    return files | {name: path for name, path in found.items() if path.exists()}


def pack(s: Settings) -> None:
    out_dir = Path(s.out_dir)
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True)
    index, stream = {"files": []}, b""
    for name, path in files_to_pack(s).items():
        raw = path.read_bytes()
        in_planes = name.endswith(".safetensors")
        packed = encode(raw, in_planes)
        about = {"name": name, "in_planes": in_planes, "packed": len(packed)}
        index["files"].append(about | {"sha256": sha256(raw)})
        stream += packed
    starts = range(0, len(stream), s.part_bytes)
    for n, first in enumerate(starts):
        (out_dir / f"part-{n}").write_bytes(stream[first : first + s.part_bytes])
    index["parts"] = [min(s.part_bytes, len(stream) - first) for first in starts]
    write_json(out_dir / "index.json", index)
    shown = ", ".join(f"part-{n} {size / 1e6:.1f} MB" for n, size in enumerate(index["parts"]))
    print(f"{out_dir}: {len(index['files'])} files in {shown}")


def join(folder: Path, out_dir: Path) -> None:
    """Unpack into out_dir/model and out_dir/data. UserError for parts that are missing or damaged."""
    if not (folder / "index.json").exists():
        raise UserError(f"{folder}: no weights there; pack them by tests/gpu.sh --pack=MODEL_FOLDER")
    index = read_json(folder / "index.json")
    parts = [folder / f"part-{n}" for n in range(len(index["parts"]))]
    wrong = [path.name for path, size in zip(parts, index["parts"])
             if not path.exists() or path.stat().st_size != size]  # fmt: skip
    if wrong:
        named = ", ".join(wrong)
        raise UserError(f"{folder}: of {len(parts)} parts {named} missing or cut off; bring all of them")
    stream, first = b"".join(path.read_bytes() for path in parts), 0
    for about in index["files"]:
        try:
            raw = decode(stream[first : first + about["packed"]], about["in_planes"])
        except (zlib.error, ValueError):
            raw = b""
        first += about["packed"]
        if sha256(raw) != about["sha256"]:
            raise UserError(f"{folder}: {about['name']} is damaged; pack again")
        path = out_dir / about["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(raw)


# ---- the loop

# Without checkpoints: they would fill the disk of that machine. Evaluations are in fp32, and several share
# the memory without knowing of one another.
TRAIN = "--preset=smollm2-135m --attention=document --seq_len=512 --batch_size=2 --dtype=bfloat16"
TRAIN += " --save_every=100000"
PRESET = {"preset": "word-problems", "eval": f"{EM_PRESETS['word-problems']['eval']} --rows=256"}
KEPT = "--thoughts_only=true"
ROWS = f"{EM_PRESETS['word-problems']['only']},samples1,samples16"
# The preset's own recipe, with its controls and other K, on five seeds that no setting was chosen on.
WORDS = PRESET | {"seed": 10, "seeds": 5, "train": f"{TRAIN} {KEPT} --max_steps=70", "only": ROWS}
# As many passes over 3,550 raw problems, of which 1,765 have nothing but an answer.
MORE = WORDS | {"seeds": 3, "train": f"{TRAIN} {KEPT} --max_steps=310", "only": "warm_flops"}
N_WORKERS = 14  # stages side by side
GSM8K_TRAIN = "--preset=smollm2-135m --attention=document --seq_len=512 --batch_size=16 --micro_batch=16"
GSM8K_TRAIN += " --save_every=100000"
GSM8K = PRESET | {
    "train": f"{GSM8K_TRAIN} {KEPT} --max_steps=200",
    "warm_train": "--max_steps=45",
    "max_new": 192,
    "only": "raw_tokens",
}
TINY = "--preset=toy --max_steps=2 --seq_len=256 --batch_size=4"
TINY_LOOP = {"only": "raw_tokens,gold", "train": TINY, "warm_train": TINY, "max_new": 8}
TINY_LOOP |= {"eval": "--limit=2 --bound_docs=1"}


def rows_so_far(out_dir: Path) -> dict:
    """What the evaluations that have ended found: {model: figures}."""
    found = {}
    keys = "n accuracy accuracy_se nll_document nll_thoughtless_document nll_bound_document ess".split()
    for path in sorted(out_dir.glob("seed*/**/eval/results.json")):
        got = read_json(path)
        model = path.parent.parent
        row = {key: got[key] for key in keys if key in got}
        if "sampled" in got:
            row["sampled"] = got["sampled"]["accuracy"]
        training = model / "training.json"
        if training.exists():
            row |= {key: read_json(training)[key] for key in ("steps", "train_tokens", "seconds")}
        found[str(model.relative_to(out_dir))] = row
    for path in sorted(out_dir.glob("seed*/**/E[0-9]/meta.json")):
        got = read_json(path)
        row = {key: got.get(key) for key in ("n_inferred", "cut_off_share", "ess", "gain_picked", "no_gain")}
        row["timing"] = read_json(path.with_name("timing.json"))
        found[str(path.parent.relative_to(out_dir))] = row
    return found


SCRIPTS = "train.py", "infer_thoughts.py", "eval_math.py"


class Workers:
    """Processes that run the stages of em.py, each one after another: Python, torch and the device are
    started once for each, where a stage of some seconds would wait longer for its start.

    Workers(n).start takes the place of data.lib.stages.start, whose results have wait() and terminate().
    """

    def __init__(self, n: int):
        context = multiprocessing.get_context("spawn")
        self.free, self.seconds = queue.SimpleQueue(), []
        for _ in range(n):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, os.getpid())).start()
            self.free.put(ours)

    def start(self, script: str, flags: dict, launcher=(), env=None, stdout=None, **how):
        assert not launcher, "a worker has one device"
        if script not in SCRIPTS:
            return start(script, flags, launcher, env, stdout=stdout, **how)
        words = [f"--{name}={value}" for name, value in flags.items() if value != ""]
        return Stage(self, script, words, stdout.name)


class Stage(threading.Thread):
    """One stage in the next worker that is free."""

    def __init__(self, workers: Workers, *order):
        super().__init__(daemon=True)
        self.workers, self.order, self.code = workers, order, 1
        self.start()

    def run(self) -> None:
        pipe, begin = self.workers.free.get(), time.time()
        pipe.send(self.order)
        self.code = pipe.recv()
        self.workers.seconds.append((Path(self.order[2]).stem, time.time() - begin))
        self.workers.free.put(pipe)

    def wait(self) -> int:
        self.join()
        return self.code

    def terminate(self) -> None:
        """It ends with this process."""


def serve(pipe, parent: int) -> None:
    """A worker: (script, words of its command line, log) come in, exit codes go out."""
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    scripts = {name: importlib.import_module(name.removesuffix(".py")) for name in SCRIPTS}
    with contextlib.suppress(EOFError):  # whoever started it has ended
        while True:
            serve_one(pipe, scripts)


def serve_one(pipe, scripts: dict) -> None:
    script, words, log = pipe.recv()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    module, code = scripts[script], 0
    try:
        module.main(read_settings(module.Settings, words, PRESETS if script == "train.py" else None))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    torch.backends.cuda.enable_cudnn_sdp(True)  # an engine turns it off
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    pipe.send(code)


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def keep(report: Report, loops: dict[str, dict]) -> None:
    """Write down what the loops have found so far."""
    for name, flags in loops.items():
        report.found[name] = {"flags": flags} | rows_so_far(Path(flags["out_dir"]))
    report.save()


def run_loops(report: Report, loops: dict[str, dict], workers: Workers) -> None:
    """em.py for each {name: flags}, until all have ended or the time is over: the next one starts when no
    other runs, or, after a minute, when a worker has nothing to do. What they have found is kept all the
    time, and in the end each one's own results."""
    import em
    from data.lib import stages

    stages.start = workers.start
    ended, waiting, begun = {}, list(loops), 0.0

    def loop(name: str, flags: dict) -> None:
        words = [f"--{key}={value}" for key, value in flags.items()]
        try:
            em.main(read_settings(em.Settings, words, EM_PRESETS))
            ended[name] = ""
        except Exception:
            ended[name] = what_failed()

    while len(ended) < len(loops) and report.left() > 6:
        idle = not workers.free.empty() and time.time() - begun > 60
        if waiting and (idle or len(ended) + len(waiting) == len(loops)):
            name, begun = waiting.pop(0), time.time()
            report.say(f"{name}: starts")
            threading.Thread(target=loop, args=(name, loops[name]), daemon=True).start()
        time.sleep(1)
        keep(report, loops)
    keep(report, loops)
    for name, flags in loops.items():
        if name not in ended:
            report.record["skipped"][name] = "the time was over before the loop"
        elif ended[name]:
            report.record["errors"][name] = ended[name]
        else:
            results = read_json(Path(flags["out_dir"]) / "results.json")
            report.found[name] |= {key: results[key] for key in ("summary", "tests", "likelihood")}
    seconds = {}
    for name, spent in workers.seconds:
        seconds.setdefault(name, []).append(round(spent, 1))
    report.put("seconds of stages", seconds)


def made_up_problems(folder: Path) -> None:
    """A few word problems for a rehearsal, in the format of the real ones."""
    (folder / "word").mkdir(parents=True, exist_ok=True)
    for name, n in (("train", 24), ("test", 8)):
        lines = [
            {"question": f"Ann has {a} nuts and finds {a % 5}. How many has she?",
             "answer": f"{a} + {a % 5} = {a + a % 5}\n#### {a + a % 5}"}
            for a in range(n)
        ]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "word" / f"{name}.jsonl").write_text(text)


def toy_base(report: Report, work: Path) -> None:
    """For a rehearsal: a toy model and made-up problems, packed into small parts and joined again."""
    source = work / "to_pack"
    script("data/digits.py", out_dir=source / "digits", warm=8, raw=2, heldout=2)
    flags = {"corpus": source / "digits/warm", "max_steps": 0, "device": report.device}
    script("train.py", **flags, out_dir=source / "model")
    made_up_problems(source / "data")
    pack(Settings(pack=str(source / "model"), data=str(source / "data"), out_dir=str(work / "packed"),
                  part_bytes=100_000))  # fmt: skip


def problems_corpus(work: Path, name: str, **more) -> Path:
    """The corpus of data/word or data/gsm8k in the base model's tokens; more: flags of data/gsm8k.py."""
    data = work / "joined/data" / name
    given = {"train": "train.jsonl", "test": "test.jsonl"} | more
    files = {key: data / x for key, x in given.items() if str(x).endswith(".jsonl")}
    out_dir = work / "_".join([name, *(str(x).removesuffix(".jsonl") for x in more.values())])
    if not (out_dir / "heldout_truth/meta.json").exists():
        flags = {"truth": True, "tokenizer": work / "base/tokenizer.json"} | more | files
        script("data/gsm8k.py", **flags, out_dir=out_dir)
    return out_dir


def prepare(report: Report, s, work: Path) -> bool:
    """The base model with its markers and the corpus of word problems; False without weights."""
    folder = Path(s.weights)
    if s.rehearse:
        toy_base(report, work)
        folder = work / "packed"
    try:
        if not (work / "joined/model/config.json").exists():  # or they have been put there by hand
            join(folder, work / "joined")
    except UserError as e:
        report.put("weights", f"none, so the loop runs on digits, from new weights: {e}")
        return False
    flags = {"init_from": work / "joined/model", "max_steps": 0, "device": report.device}
    script("train.py", **flags, marker_rows="words", out_dir=work / "base")
    hashes = {path.name: sha256(path.read_bytes()) for path in sorted((work / "joined/model").iterdir())}
    report.put("weights", hashes)
    return True


def words(report: Report, s) -> None:
    """Word problems with K = 4, 1 and 16 and the controls; with more of them raw; then GSM8K."""
    work = Path(s.work) / "words"
    work.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = Workers(2 if s.rehearse else N_WORKERS)
    common = {"device": report.device, "iterations": 3, "jobs": N_WORKERS}
    if s.rehearse:
        common = {"device": report.device, "jobs": 2, "iterations": 1} | TINY_LOOP
    if not prepare(report, s, work):
        return run_loops(report, {"digits": common | {"out_dir": work / "digits"}}, workers)
    loops = {}
    for name, flags, data, parts in [
        ("word problems", WORDS, "word", {"warm": 250, "raw": 800, "seed": 1}),
        ("word problems, 3,550 raw", MORE, "word", {"warm": 250, "raw_more": "raw_more.jsonl", "seed": 1}),
        ("GSM8K", GSM8K, "gsm8k", {"warm": 500, "raw": 1000, "heldout": 300}),
    ][: 2 if s.rehearse else None]:
        if not (work / "joined/data" / data).exists():
            report.record["skipped"][name] = f"no problems of {data} were brought"
            continue
        if s.rehearse:
            parts, flags = {"warm": 8, "raw": 8 + len(loops)}, flags | {"seeds": 1}
        flags = flags | common | {"corpus": problems_corpus(work, data, **parts), "base": work / "base"}
        loops[name] = flags | {"out_dir": work / f"loop{len(loops)}"}
    run_loops(report, loops, workers)
    show(report)


def show(report: Report) -> None:
    """Accuracies by model, last, for whoever reads only the end of the output."""
    for name, rows in report.found.items():
        if isinstance(rows, dict):
            right = {model: row["accuracy"] for model, row in rows.items()
                     if isinstance(row, dict) and "accuracy" in row}  # fmt: skip
            if right:
                report.say(f"{name}: {json.dumps(right)}")


if __name__ == "__main__":
    run(pack, Settings)
