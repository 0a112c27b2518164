#!/usr/bin/env bash
# Everything that only a GPU can show, on a machine with one H100, in at most 9 minutes.
#
#   tests/gpu.sh                         all stages; JSON files into ${OUT:-tests/gpu}
#   tests/gpu.sh --stages=right,train    some of them: right, train, sample, words
#   tests/gpu.sh --rehearse              every stage on the CPU in tiny sizes (CI does that)
#   tests/gpu.sh --pack=/tmp/smollm2     here, before: weights and data into tests/gpu/weights
#
# Each stage is a process of its own with its own limit of time, and writes its JSON with whatever it has
# found so far: an error or the end of the time loses only what is left. tests/gpu/README.md says how the
# weights travel. PYTHON: the interpreter; SECONDS_IN_ALL: the limit for all stages, 530 if unset.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
all=${SECONDS_IN_ALL:-530}
stages=right,train,sample,words
rehearse=
out=${OUT:-tests/gpu}
for word in "$@"; do
  case $word in
    --rehearse) rehearse=--rehearse ;;
    --stages=*) stages=${word#*=} ;;
    --pack=*) exec "$python" tests/gpu_words.py "$word" ;;
    *) echo "$word: expected --rehearse, --stages=right,train,sample,words or --pack=FOLDER" >&2; exit 2 ;;
  esac
done
if [ -n "$rehearse" ] && [ -z "${OUT:-}" ]; then # never over the results of a real run
  out=$(mktemp -d)
fi
if [ -n "$rehearse" ]; then # stages run side by side
  export OMP_NUM_THREADS=1
fi
work=${WORK:-$(mktemp -d)}
mkdir -p "$out" "$work"
begin=$(date +%s)
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# One line, before anything can fail for want of a package.
"$python" - <<'CODE' || exit 2
import importlib.util as u
missing = [n for n in "torch numpy tiktoken sympy triton transformers".split() if not u.find_spec(n)]
told = "(without triton nothing is compiled for a GPU, without transformers two comparisons are left out, the "
told += "others are needed: see tests/gpu/README.md)"
print("== missing packages:", " ".join(missing), told if missing else "none")
raise SystemExit(bool({"torch", "numpy", "tiktoken", "sympy"} & set(missing)))
CODE

run_stage() { # NAME SECONDS: TERM lets a stage write what it has; KILL comes 8 s later
  timeout -k 8 $(($2 - 8)) "$python" tests/gpu_stages.py --stage="$1" --out_dir="$out" --work="$work" \
    --seconds=$(($2 - 10)) $rehearse 2>&1 | tee -a "$out/log.txt"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || echo "== $1: exit code $code"
  return "$code"
}

failed=
for stage in ${stages//,/ }; do
  case $stage in # seconds; what a stage does not use is left for the later ones
    right) limit=100 ;;
    train) limit=100 ;;
    sample) limit=80 ;;
    words) limit=$all ;;
    *) echo "--stages=$stage: expected right, train, sample or words" >&2; exit 2 ;;
  esac
  left=$((begin + all - $(date +%s)))
  if [ -n "$rehearse" ] || [ "$limit" -gt "$left" ]; then limit=$left; fi
  if [ "$limit" -lt 15 ]; then
    echo "== $stage: no time left"
    failed="$failed $stage"
    continue
  fi
  echo "== $stage: at most $limit s"
  if [ -n "$rehearse" ]; then # side by side: on a CPU most of the time goes into starting commands
    run_stage "$stage" "$limit" &
    jobs="${jobs:-} $!:$stage"
  else
    run_stage "$stage" "$limit" || failed="$failed $stage"
  fi
done
for job in ${jobs:-}; do
  wait "${job%%:*}" || failed="$failed ${job##*:}"
done
echo "== $(($(date +%s) - begin)) s in all, results in $out; failed:${failed:- none}"
[ -z "$failed" ]
