#!/usr/bin/env bash
# One machine's part of a job, for launch.tpu_vm. It lies in the folder of the code; what it knows is in job/ there.
# usage: bash launch/worker.sh setup           makes the environment, with the TPU's libraries
#        bash launch/worker.sh start ID WORD... starts python -m WORD..., detached; NAME=VALUE lines on standard input
#                                               go into its environment alone
#        bash launch/worker.sh state           "HOST idle", "HOST running ID" or "HOST exited CODE SECONDS ID"
#        bash launch/worker.sh log LINES       the last lines of its output
#        bash launch/worker.sh stop            ends it at once
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup() {
  # A TPU's machine may come with a Python that is too old for us: uv brings another, without touching the system's.
  if [ -z "${JAXLM_PYTHON:-}" ] && ! command -v python3.12 >/dev/null; then
    python3 -m pip install --user --quiet --disable-pip-version-check uv
    uv="$(python3 -m site --user-base)/bin/uv"
    "$uv" python install --quiet 3.12
    JAXLM_PYTHON="$("$uv" python find 3.12)"
    export JAXLM_PYTHON
  fi
  # shellcheck source=launch/environment.sh
  . launch/environment.sh
  JAXLM_EXTRAS=tpu make_environment "$PWD"
}

present() {
  [ -s job/pid ] && kill -0 "$(cat job/pid)" 2>/dev/null
}

# What has told its exit code is over, even if its shell is still there for a moment.
alive() {
  [ ! -e job/exit ] && present
}

start() {
  local id="$1" line
  shift
  if alive; then
    [ "$(cat job/id)" = "$id" ] && return
    echo "another command runs here already: $(cat job/command)" >&2
    exit 2
  fi
  while IFS= read -r line; do export "${line?}"; done
  mkdir -p job
  rm -f job/exit job/pid
  printf '%s\n' "$id" >job/id
  printf '%s\n' "$*" >job/command
  # In a session of its own, so that it outlives the connection and can be ended as a whole.
  # shellcheck disable=SC2016
  setsid nohup bash -c '
    code=0
    "$@" || code=$?
    echo "$code $(date +%s.%N)" >job/exit.new
    mv job/exit.new job/exit
  ' job "${JAXLM_VENV:-.venv}/bin/python" -m "$@" >>job/log 2>&1 </dev/null &
  echo $! >job/pid
}

state() {
  if [ -s job/exit ]; then
    echo "$(hostname) exited $(cat job/exit) $(cat job/id)"
  elif alive; then
    echo "$(hostname) running $(cat job/id)"
  elif [ -s job/id ]; then
    echo "$(hostname) exited 137 0 $(cat job/id)" # gone without a word: killed, or the machine started anew
  else
    echo "$(hostname) idle"
  fi
}

stop() {
  alive || return 0
  kill -KILL -- "-$(cat job/pid)"
  echo "137 $(date +%s.%N)" >job/exit
  for _ in {1..50}; do
    present || return 0
    sleep 0.1
  done
}

case "${1:-}" in
  setup) setup ;;
  start) shift && start "$@" ;;
  state) state ;;
  log) [ ! -e job/log ] || tail -n "${2:-50}" job/log | sed "s/^/$(hostname): /" ;;
  stop) stop ;;
  *) sed -n '3,8s/^# //p' "${BASH_SOURCE[0]}" && exit 2 ;;
esac
