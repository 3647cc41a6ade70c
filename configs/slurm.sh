#!/usr/bin/env bash
# Run a recipe under Slurm, on any number of nodes. Before the time limit, and on preemption, the run finishes a window and
# saves a checkpoint. Then the job is queued again. It continues from the checkpoint, on any number of nodes.
#
#   sbatch --nodes 2 --gres gpu:8 --time 4:00:00 configs/slurm.sh recipes/causal_lm.py --config configs/causal_lm.yaml \
#     --output.dir runs/causal_lm
#
# A window and a save may take 3 minutes. If they take longer, set sbatch --signal=B:TERM@SECONDS. They may take only 30 s
# on scancel, and on preemption without PreemptParameters=send_user_signal: there Slurm signals all processes.
#
# Submit from the folder of gradacc, which all nodes share, with .venv set up by ./launch.sh (or VENV=…). --output.dir is
# required.
#SBATCH --job-name=gradacc
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

run=
for ((i = 1; i <= $#; i++)); do
  [[ ${!i} == --output.dir ]] && j=$((i + 1)) && run=${!j}
  [[ ${!i} == --output.dir=* ]] && run=${!i#*=}
done
[[ -n $run ]] || { echo "error: --output.dir is missing; without it, a job that is queued again cannot find the run" >&2; exit 2; }

rm -f "$run/TO_BE_RESUMED" # a file of an earlier start must not queue the job again

main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))
# Signal only the launchers, which pass the signal on to the processes of the recipe. srun turns SIGTERM into SIGKILL.
# scancel signals every process, including Accelerate's launcher, which kills the processes of the recipe 30 s later.
trap 'srun --overlap pkill -TERM -f "^bash .*launch[.]sh .* --main_address $main"' TERM
# One launcher per node. Since Slurm 22.05, srun does not inherit --cpus-per-task.
srun --kill-on-bad-exit=0 --cpus-per-task "$SLURM_CPUS_PER_TASK" bash -c 'exec ./launch.sh "$@" --machine_rank "$SLURM_NODEID"' \
  launch "$@" --resume auto --machines "$SLURM_JOB_NUM_NODES" --main_address "$main" &
launchers=$!
while true; do
  wait "$launchers" && code=0 || code=$?
  kill -0 "$launchers" 2>/dev/null || break # still running: a signal interrupted the wait
done

# Also after the time limit, when Slurm leaves 30 s. A cancelled job is not queued again.
state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format "%T %r")
if [[ -e $run/TO_BE_RESUMED && $state =~ RUNNING|TimeLimit ]]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
