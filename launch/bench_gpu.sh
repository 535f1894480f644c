#!/usr/bin/env bash
# Measures on one NVIDIA GPU what docs/results/speed.md aims at there.
#
#   bash launch/bench_gpu.sh [--folder=runs/bench_gpu] [NAME...]     all, or those named; --list says which there are
#
# Each takes less than ten minutes on an H100 or H200 and is stopped after that; what has been measured is kept, and the
# others go on. The figures are FOLDER/NAME.json with a plot beside them, the tables FOLDER/NAME.txt. Needs
# pip install -e '.[cuda,bench,report]' pytest and a torch that sees the GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

folder=runs/bench_gpu names=() list=false
for argument in "$@"; do
  case "$argument" in
    --folder=*) folder="${argument#*=}" ;;
    --list) list=true ;;
    -*) echo "error: unknown option $argument; see the head of $0" >&2; exit 2 ;;
    *) names+=("$argument") ;;
  esac
done
mkdir -p "$folder"
failed=() known=()

measure() {  # NAME [VARIABLE=VALUE...] COMMAND...
  local name="$1"; shift
  known+=("$name")
  if $list; then printf '%-22s %s\n' "$name" "$*"; return; fi
  if (( ${#names[@]} )) && [[ " ${names[*]} " != *" $name "* ]]; then return; fi
  echo "== $name: $*"
  timeout --kill-after=10 600 env PYTHONUNBUFFERED=1 "$@" 2>&1 | tee "$folder/$name.txt" || failed+=("$name")
}

bench() {  # NAME [VARIABLE=VALUE...] -- FLAGS OF launch.bench...
  local name="$1" settings=(); shift
  while [[ "$1" != -- ]]; do settings+=("$1"); shift; done
  shift
  measure "$name" ${settings[@]+"${settings[@]}"} python -m launch.bench "$@" --out="$folder/$name.json"
}

train=(--suite=train --dtype=bfloat16)
decode=(--suite=decode --dtype=bfloat16 --requests=0)
peer=(--against=torch --compile_seconds=200)

# cuDNN's attention, masks of packed rows and windows included, is right at all.
measure correct JAX_PLATFORMS=cuda python -m pytest -q -n0 tests/nn/test_attention.py

# Utilization of the measured peak: at least 50% and 60%, and no slower than the compiled script.
bench train_124m -- "${train[@]}" "${peer[@]}" --size=124m --set=model.scan=false
bench train_124m_scanned -- "${train[@]}" --size=124m --set=model.scan=true
bench train_1.3b -- "${train[@]}" "${peer[@]}" --size=1.3b --batch=8 --set=model.scan=false --set=model.remat=none
bench train_1.3b_remat -- "${train[@]}" --size=1.3b --batch=8,16 --set=model.remat=dots

# What attention costs: cuDNN above, and what runs where it cannot.
bench train_124m_blockwise -- "${train[@]}" --size=124m --set=model.scan=false --set=model.attention=blockwise
bench train_124m_plain -- "${train[@]}" --size=124m --set=model.scan=false --set=model.attention=plain

# Eight runs in one program: at most twice the time of one.
bench at_once -- "${train[@]}" --size=10m --batch=8 --context=256 --at_once=8

# Share of the copy bandwidth at batch 1: at least 70% at 7 B, 50% at 0.6 B; then where launches rule, and batches.
bench decode_7b -- "${decode[@]}" "${peer[@]}" --size=7b --batch=1 --repetitions=3
bench decode_0.6b -- "${decode[@]}" "${peer[@]}" --size=0.6b --batch=1,64 --repetitions=3
bench decode_small -- "${decode[@]}" --size=10m --size=124m --batch=1,32
bench decode_requests -- --suite=decode --dtype=bfloat16 --size=124m --batch=64 --requests=256

# Settings of XLA's that may pay.
graphs=XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL
cublas=XLA_FLAGS=--xla_gpu_enable_triton_gemm=false
bench decode_7b_graphs "$graphs" -- "${decode[@]}" --size=7b --batch=1
bench decode_0.6b_graphs "$graphs" -- "${decode[@]}" --size=0.6b --batch=1,64
bench decode_7b_cublas "$cublas" -- "${decode[@]}" --size=7b --batch=1
bench train_124m_cublas "$cublas" -- "${train[@]}" --size=124m --set=model.scan=false

# From the command to the first step; compiling by depth; learning from rewards (TRL: pip install -e '.[trl]').
bench startup -- --suite=startup --size=124m --repetitions=1
bench rl -- --suite=rl --seeds=0 --updates=60 --against=trl

for name in ${names[@]+"${names[@]}"}; do
  if [[ " ${known[*]} " != *" $name "* ]]; then echo "error: nothing is called $name; see --list" >&2; exit 2; fi
done
if (( ${#failed[@]} )); then echo "failed or out of time: ${failed[*]}" >&2; exit 1; fi
