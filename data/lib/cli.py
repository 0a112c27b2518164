"""What every command of this project shares: typed settings, one-line errors, a
progress line, locks, other scripts, and files that are whole or absent.

A script declares one flat dataclass and ends with `run(main, Settings)`:

    @dataclass(kw_only=True)
    class Settings:
        corpus: str = opt(help="the corpus folder")            # no default: the flag is required
        samples: int = opt(4, "thoughts a chunk (K)", low=1)   # --samples=8

    def main(s: Settings): ...

    if __name__ == "__main__":
        run(main, Settings)

Standard library only, so that importing it costs nothing.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder of the scripts
LEAST = -1e9  # what --min_gain=-inf is in files: JSON has no infinity


class UserError(Exception):
    """Something that the user can mend.

    The message is one line: file or flag, what was expected, what to do.
    """


# -------------------- settings


def opt(default=dataclasses.MISSING, help: str = "", low: float | None = None):
    """A setting: its default (none: required), one line of help, and the smallest value allowed."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low})


def convert(flag: str, text: str, kind: type, low: float | None):
    """The flag's text as a value of its type, or UserError."""
    choices = typing.get_args(kind)
    if choices:  # Literal["a", "b"]
        if text not in choices:
            raise UserError(f"{flag}={text}: expected one of {', '.join(choices)}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"{flag}={text}: expected true or false")
        return text.lower() in ("true", "1")
    try:
        value = kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"{flag}={text}: expected {wanted}") from None
    # NaN fails the last comparison, too; -inf is for a setting whose low is -inf.
    if kind is float and value != low and not abs(value) < float("inf"):
        raise UserError(f"{flag}={text}: expected a finite number")
    if low is not None and value < low:
        raise UserError(f"{flag}={text}: must be at least {low}")
    return value


def read_settings(settings: type, argv: list[str], presets: dict[str, dict] | None = None):
    """`--name=value ...` as an instance of the dataclass `settings`; UserError otherwise.

    A bare `--name` sets a bool. Words without -- are refused, or, if the dataclass has a
    field of type list, gathered there: `files: list = opt(help=...)`. With presets,
    --preset names one; what it holds takes the place of the defaults.
    """
    fields = {f.name: f for f in dataclasses.fields(settings)}
    words = next((name for name, f in fields.items() if f.type is list), None)
    values = {}
    for word in argv:
        if word.startswith("--"):
            name, value = read_flag(word, {k: f for k, f in fields.items() if k != words})
            values[name] = value
        elif words:
            values.setdefault(words, []).append(word)
        else:
            raise UserError(f"{word}: settings are written --name=value; --help lists them")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            shown = word_name(field) if name == words else f"--{name}=..."
            raise UserError(f"{shown} is required: {field.metadata['help']}")
    preset = presets[values["preset"]] if "preset" in values else {}
    return settings(**preset | values)


def read_flag(word: str, fields: dict) -> tuple[str, object]:
    """(name, value) of `--name=value`; UserError names the nearest setting."""
    name, has_value, text = word.removeprefix("--").partition("=")
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        hint = f"did you mean --{near[0]}?" if near else "--help lists them"
        raise UserError(f"--{name}: no such setting; {hint}")
    field = fields[name]
    if not has_value and field.type is not bool:
        raise UserError(f"--{name} needs a value: --{name}=...")
    text = text if has_value else "true"
    return name, convert(f"--{name}", text, field.type, field.metadata["low"])


def word_name(field) -> str:
    """What the words of a list field are called in help and errors: FILE ... for `files`."""
    return f"{field.name.removesuffix('s').upper()} ..."


def help_text(settings: type, doc: str) -> str:
    """The script's docstring and a line for each setting: name, type, default, meaning."""
    lines = [doc.strip(), "", "Settings (--name=value):"]
    for f in dataclasses.fields(settings):
        kind = "|".join(typing.get_args(f.type)) or f.type.__name__
        flag = word_name(f) if f.type is list else f"--{f.name}={kind}"
        required = f.default is dataclasses.MISSING
        default = "required" if required else f"default {f.default!r}"
        lines.append(f"  {flag}".ljust(34) + f"  {f.metadata['help']} ({default})")
    return "\n".join(lines)


def run(main, settings: type, presets: dict[str, dict] | None = None) -> None:
    """main(settings of sys.argv); bad input and Ctrl-C end in a line and a bad exit code."""
    name = os.path.basename(sys.argv[0])
    if os.environ.pop("EM_CHILD", None):
        threading.Thread(target=die_with_parent, daemon=True).start()
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(settings, sys.modules["__main__"].__doc__))
            return
        main(read_settings(settings, sys.argv[1:], presets))
        sys.stdout.flush()
    except UserError as e:
        sys.exit(f"{name}: error: {e}")
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python em.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:  # disk full, no permission, ...
        sys.exit(f"{name}: error: {e.filename or 'a file'}: {e.strerror or e}")


# -------------------- other scripts


def start(script: str, flags: dict, launcher=(), env: dict | None = None, **how):
    """Start a script, `python SCRIPT --name=value ...`, as subprocess.Popen.

    Flags that are "" are left out. `launcher` goes before the script, as in ["-m",
    "torch.distributed.run"]; `env` is added to the environment; `how` goes to
    Popen. The child's standard input is a pipe from this process. It closes when
    this process ends, however that ends, and then the child ends, too (see run).
    """
    words = [f"--{name}={value}" for name, value in flags.items() if value != ""]
    command = [sys.executable, *launcher, str(ROOT / script), *words]
    env = os.environ | {"EM_CHILD": "1"} | (env or {})
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=env, **how)


def die_with_parent() -> None:
    """End this process when its standard input closes: whoever started it has ended."""
    while os.read(0, 4096):
        pass
    os._exit(1)


# -------------------- progress


def duration(seconds: float) -> str:
    minutes, sec = divmod(int(seconds + 0.5), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{sec:02d}s"


class Progress:
    """One line that is rewritten in place on a terminal, and printed every 15 seconds elsewhere.

    train    120/400 steps (30%) | loss 1.234 | 45,012 tok/s | eta 0m12s
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self.label, self.total, self.unit, self.first = label, total, unit, done
        self.start, self.shown = time.time(), time.time()
        self.live = sys.stdout.isatty()

    def line(self, done: int, figures: dict, last: bool) -> str:
        spent = time.time() - self.start
        rate = (done - self.first) / max(spent, 1e-9)
        share = done / max(self.total, 1)
        left = duration((self.total - done) / rate) if rate else "?"
        parts = [f"{self.label:<10} {done}/{self.total} {self.unit} ({share:.0%})"]
        parts += [f"{name} {figure}".strip() for name, figure in figures.items()]
        parts += [f"{rate:,.1f} {self.unit}/s"]
        parts += [f"in {duration(spent)}" if last else f"eta {left}"]
        return " | ".join(parts)

    def update(self, done: int, **figures) -> None:
        """Say where we are; `figures` are shown as `name value`."""
        last = done >= self.total
        if not last and time.time() - self.shown < (0.2 if self.live else 15):
            return
        self.shown = time.time()
        text = self.line(done, figures, last)
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            text = "\r" + text[:width].ljust(width) + ("\n" if last else "")
        print(text, end="" if self.live else "\n", flush=True)


# -------------------- files, whole or absent


@contextlib.contextmanager
def naming(path):
    """Of a full disk the system names no file: let the error name the one that is written."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path`, renamed onto it if the block ends well, else removed."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def hold(path, wait: bool = True):
    """Hold a lock file against other processes; yields the number of its open file.

    With wait=False it yields 0 where another process holds it. The system lets go
    of the lock when all processes that have the file open have ended, however they
    end. Where there are no locks (some network disks) everybody holds it and gets
    True: work may be done twice, with one result.
    """
    with open(path, "a") as f:
        held = f.fileno() or True  # 0 where the standard input was closed
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = 0
        except OSError:
            held = True
        yield held


@contextlib.contextmanager
def new_folder(path):
    """A temporary folder that takes the name `path` when the block ends well.

    One of ours (with a meta.json) that stood there is replaced then.
    """
    path = Path(path)
    if path.exists() and not (path / "meta.json").exists() and any(path.iterdir()):
        raise UserError(f"{path}: holds other files; remove it or give another --out_dir")
    temporary = path.with_name(path.name + ".tmp")
    before = path.with_name(path.name + ".old")
    for left in (temporary, before):  # what a killed run has left
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with naming(path):
            yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():  # moved first: what is half removed has no meta.json
        os.rename(path, before)
    os.rename(temporary, path)
    shutil.rmtree(before, ignore_errors=True)


def write_json(path, value) -> None:
    """Write JSON, whole or not at all. ValueError for NaN and infinity, which are not JSON."""
    with replacing(path) as temporary:
        text = json.dumps(value, indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path) -> dict:
    """The JSON object in a file; UserError when it is missing or damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        why = "no such file; the folder is missing or was not finished"
        raise UserError(f"{path}: {why}") from None
    except (ValueError, RecursionError) as e:  # also UnicodeDecodeError
        raise UserError(f"{path}: not valid JSON ({e}); make the folder again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def append_jsonl(path, record: dict) -> int:
    """Append one line to a file; returns where it begins.

    A line cut short by a kill is closed first, so it cannot swallow the next.
    """
    with naming(path), open(path, "ab+") as f:
        if f.tell() and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n":
            f.write(b"\n")
        begin = f.tell()
        f.write(json.dumps(record).encode() + b"\n")
    return begin


def claim(out_dir, settings, free: tuple = ("device",)) -> Path:
    """Make out_dir and note the settings in settings.json.

    UserError when it was made with other settings, but for those in `free`. So a
    folder never mixes two runs: the same command resumes or finds it complete,
    another one is refused.
    """
    out_dir = Path(out_dir)
    now = dataclasses.asdict(settings)
    for name in ("out_dir", *free):
        now.pop(name, None)
    if (out_dir / "settings.json").exists():
        before = {f.name: f.default for f in dataclasses.fields(settings) if f.name in now}
        before |= read_json(out_dir / "settings.json")
        names = [k for k in sorted(now | before) if now.get(k) != before.get(k)]
        changed = [f"--{k}={before.get(k)} became {now.get(k)}" for k in names]
        if changed:
            how = f"made with other settings ({'; '.join(changed)})"
            raise UserError(f"{out_dir}: {how}; remove it or give another --out_dir")
    else:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(out_dir / "settings.json", now)
    return out_dir
