mkdir -p runs/slurm

# the job; secrets by name
sbatch --parsable <<'END'
#!/usr/bin/env bash
#SBATCH --job-name=ppo1
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm/ppo1-%j.log
#SBATCH --export=ALL,HF_TOKEN
#SBATCH --requeue
#SBATCH --partition=gpu
set -u
export TAG='first try'
state="runs/slurm/ppo1-$SLURM_JOB_ID"
rm -f "$state.first"

# Only when Slurm ends the whole job, by scancel or by a preemption that it sees to itself.
told=
trap 'told=yes' TERM
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --export=ALL bash -c '
  trap : TERM  # the program saves; this shell has to wait for it
  code=0
  "$@" || code=$?
  if [ "$code" != 0 ]; then (set -o noclobber; echo "$code" >"$0") 2>/dev/null; fi
  exit "$code"
' \
  "$state.first" .venv/bin/python -m launch.train --experiment=ppo_tiny --set=mesh.fsdp=none --set=parent=runs/sft --workdir=runs/ppo1
code=$?
if [ -s "$state.first" ]; then code="$(cat "$state.first")"; fi
echo "$(date -u +%FT%TZ) the job ended with exit code $code"
if [ -n "$told" ]; then exit "$code"; fi

# Preemptions and failures are counted apart; Slurm counts every start after the first.
case "$code" in
  0 | 2 | 3) exit "$code" ;;
  42) ;;
  *) echo "$code" >>"$state.failures" ;;
esac
failures="$(cat "$state.failures" 2>/dev/null | wc -l)"
preemptions=$((${SLURM_RESTART_COUNT:-0} + 1 - failures))
if [ "$failures" -gt 3 ] || [ "$preemptions" -gt 100 ]; then
  echo "failed $failures times, preempted $preemptions times: it does not start again"
  exit "$code"
fi
scontrol requeue "$SLURM_JOB_ID"
exit "$code"
END
