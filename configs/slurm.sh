#!/usr/bin/env bash
# A recipe under Slurm, on any number of nodes. Before its time is over, or when it is preempted, the run finishes its window
# and saves; what is left to do is queued again and goes on from there, on as many nodes as it gets then.
#
#   sbatch --nodes 2 --gres gpu:8 --time 4:00:00 configs/slurm.sh recipes/causal_lm.py --config configs/causal_lm.yaml \
#     --output.dir runs/causal_lm
#
# A window and its save have 3 minutes; where they take longer, sbatch --signal=B:TERM@SECONDS. They have 30 s where Slurm itself
# signals all there is: on scancel, and on preemption in a cluster without PreemptParameters=send_user_signal.
#
# From the folder of gradacc, which all nodes share, with .venv set up by ./launch.sh (or VENV=…). It needs --output.dir.
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
[[ -n $run ]] || { echo "error: give --output.dir: without it, a job that is queued again does not find its run" >&2; exit 2; }

rm -f "$run/TO_BE_RESUMED" # so that only what this life leaves queues the job again, not what an earlier one left

main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))
# A signal is for the launchers alone, which pass it on to the recipe's processes. srun makes a SIGKILL of a SIGTERM, and scancel
# sends one to every process there is, also to Accelerate's launcher, which kills the recipe's processes 30 s later.
trap 'srun --overlap pkill -TERM -f "^bash .*launch[.]sh .* --main_address $main"' TERM
# One launcher a node. Since Slurm 22.05, srun does not take over --cpus-per-task by itself.
srun --kill-on-bad-exit=0 --cpus-per-task "$SLURM_CPUS_PER_TASK" bash -c 'exec ./launch.sh "$@" --machine_rank "$SLURM_NODEID"' \
  launch "$@" --resume auto --machines "$SLURM_JOB_NUM_NODES" --main_address "$main" &
launchers=$!
while true; do
  wait "$launchers" && code=0 || code=$?
  kill -0 "$launchers" 2>/dev/null || break # else the signal has ended the waiting
done

# Also where its time is over by now (it is given 30 s more); a job that was cancelled stays so.
state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format "%T %r")
if [[ -e $run/TO_BE_RESUMED && $state =~ RUNNING|TimeLimit ]]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
