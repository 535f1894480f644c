"""Small programs that stand in for a cluster's own: first on PATH, they write down how they were called, and answer.

`gcloud ssh` runs what it is given on "hosts" that are folders here, so that launch/worker.sh is the real one. What a
job does there, its interpreter says: the next line of `does/HOST`, an exit code, `hang`, or `preempt`.
"""

import os
import shutil
from pathlib import Path

from tests.source import ROOT

GCLOUD = r"""
echo "gcloud $*" >>"$STUBS/calls"
flag() { for a in "${args[@]}"; do case "$a" in "--$1="*) echo "${a#*=}" ;; esac; done; }
args=("$@")
nodes="$STUBS/nodes" requests="$STUBS/requests"
touch "$nodes" "$requests"
case "$3 $4" in
  "tpu-vm list") [ ! -e "$STUBS/deaf" ] || { echo "ERROR: no active account" >&2; exit 1; }
    cat "$nodes" ;;
  "queued-resources list") # each look at a request moves it on by one state, while there are more than one
    while IFS= read -r line; do echo "${line%%;*}"; done <"$requests"
    sed -i -E 's/^([^,]*),[^;]*;(.*)/\1,\2/' "$requests" ;;
  "tpu-vm create") [ ! -e "$STUBS/full" ] || { echo "ERROR: no more capacity in the zone" >&2; exit 1; }
    echo "$5,READY" >>"$nodes" ;;
  "queued-resources create") answer="$(head -n 1 "$STUBS/answers")"; sed -i 1d "$STUBS/answers"
    echo "$5,$answer" >>"$requests"
    for node in $(if [ -n "$(flag node-count)" ]; then seq -f "$5-%g" 0 1; else echo "$5"; fi); do
      echo "$node,READY" >>"$nodes"
    done ;;
  *" delete") : >"$nodes"; : >"$requests"; rm -rf "$STUBS/hosts" ;;
  "tpu-vm scp") for i in 0 1; do mkdir -p "$STUBS/hosts/$6w-$i"; cp "$5" "$STUBS/hosts/$6w-$i/"; done ;;
  "tpu-vm ssh")
    case "$*" in *" state;"*) [ ! -e "$STUBS/slow" ] || sleep 30 ;; esac
    worker="$(flag worker)"
    [ "$worker" != all ] || worker="0 1"
    for i in $worker; do
      host="$STUBS/hosts/$5:w-$i"
      [ -d "$host" ] || { echo "ERROR: no route to host" >&2; exit 255; }
      command="$(flag command)"
      case "$command" in
        *" setup")
          (cd "$host" && eval "${command%% && *}")
          mkdir -p "$host/$NAME/.venv/bin" && cp "$STUBS/bin/job" "$host/$NAME/.venv/bin/python" ;;
        *) (cd "$host" && HOST="$5-w-$i" bash -c "$command") ;;
      esac
    done ;;
esac
"""
JOB = r"""
echo "$HOST starts $*" >>"$STUBS/starts"
env >"$STUBS/environment.$HOST"
does="$(head -n 1 "$STUBS/does/$HOST")"
sed -i 1d "$STUBS/does/$HOST"
case "$does" in
  hang) exec sleep 60 ;;
  preempt) sed -i 's/READY/PREEMPTED/' "$STUBS/nodes"; sed -i 's/ACTIVE/SUSPENDED/' "$STUBS/requests"; exec sleep 60 ;;
  *) echo "the last words of $HOST"; exit "$does" ;;
esac
"""
HOSTNAME = 'echo "${HOST:-here}"'
SRUN = r"""
echo "srun $*" >>"$STUBS/calls"
while [ "${1#--}" != "$1" ]; do shift; done
code=0 pids=()
for i in 0 1; do HOST="task-$i" "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || { c=$?; [ "$c" -le "$code" ] || code=$c; }; done
exit "$code"
"""
KUBECTL = r"""
echo "kubectl $*" >>"$STUBS/calls"
case "$*" in
  *" -f -") cat >>"$STUBS/applied"; [ ! -e "$STUBS/taken" ] || { echo "AlreadyExists" >&2; exit 1; } ;;
  *" get jobset "*) [ -s "$STUBS/jobset.json" ] || { echo "jobsets not found" >&2; exit 1; }
    cat "$STUBS/jobset.json" ;;
esac
"""
SBATCH = r"""
echo "sbatch $*" >>"$STUBS/calls"
cat >"$STUBS/submitted"
[ ! -e "$STUBS/refuse" ] || { echo "sbatch: error: invalid partition specified: gpuu" >&2; exit 1; }
echo "123;cluster"
"""
GIT = """
case "$1" in
  archive) tar -C "$ROOT" -czf "${4#--output=}" --transform "s,^,$NAME/," launch/worker.sh launch/environment.sh ;;
esac
"""
CALLED = 'echo "{name} $*" >>"$STUBS/calls"'
PROGRAMS = {"gcloud": GCLOUD, "job": JOB, "hostname": HOSTNAME, "srun": SRUN, "kubectl": KUBECTL, "sbatch": SBATCH}
PROGRAMS |= {"git": GIT} | {name: CALLED.format(name=name) for name in ("scontrol", "squeue", "scancel")}


def install(folder: Path, monkeypatch, name: str) -> Path:
    """Puts the programs first on PATH; in `folder` are their answers and what they have written down."""
    (folder / "bin").mkdir(parents=True)
    (folder / "does").mkdir()
    for program, text in PROGRAMS.items():
        path = folder / "bin" / program
        path.write_text(f"#!{shutil.which('bash')}\n{text}")
        path.chmod(0o755)
    for variable, value in (("STUBS", folder), ("NAME", name), ("ROOT", ROOT)):
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(folder)
    return folder


def does(folder: Path, **hosts: str) -> None:
    """What the job does on each host, start after start: does(folder, w_0="1 0") fails once and then succeeds."""
    for host, what in hosts.items():
        (folder / "does" / host.replace("_", "-")).write_text("\n".join(what.split()) + "\n")


def calls(folder: Path, text: str = "") -> list[str]:
    path = folder / "calls"
    return [line for line in path.read_text().splitlines() if text in line] if path.exists() else []
