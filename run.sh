#!/usr/bin/env bash
# The one door to this project: sets up what a command needs, then runs it. See ./run.sh --help.
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
VENV="${VENV_DIR:-$ROOT/.venv}"
ALGOPERF_VENV="${ALGOPERF_VENV_DIR:-$ROOT/.venv-algoperf}"
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
[[ "$ALGOPERF_VENV" == /* ]] || ALGOPERF_VENV="$PWD/$ALGOPERF_VENV"
CACHE="$ROOT/.cache"
ALGOPERF_URL="https://github.com/mlcommons/algorithmic-efficiency.git"
ALGOPERF_COMMIT="2c90454fc05d5bdf3598b0c7651e611f132a7060"
ALGOPERF_PIP="pip>=25"
NEEDED_KB=3000000
DRY_RUN=false

export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONUNBUFFERED=1

usage() {
  cat <<'END'
usage: ./run.sh [--dry-run] [COMMAND] [ARGUMENTS]

  quickstart    compare K-FAC with tuned Nesterov and NAdamW on real molecules (the default)
  test          run the test suite
  setup         set up without running anything
  algoperf      train with AlgoPerf's own submission_runner
  slurm         send the trials of a study to a Slurm cluster, one job each
  compare       compare runs: steps-to-target and time-to-target
  experiments   tables and figures of the paper
  benchmarks    speed and memory
  memory        what K-FAC's factors need of a V100, for every AlgoPerf workload; no GPU needed
  docker        build the image, or run a command in it
  package       write the folder that AlgoPerf's submissions repository expects

./run.sh COMMAND --help tells about a command. --dry-run prints the exact commands instead of
running them. Needs Linux, Python 3.11 or newer and access to a Python package registry.

environment:
  PYTHON                 the Python to set up with (default: the first suitable one on PATH)
  VENV_DIR               where the packages go (default: .venv)
  NPROC                  number of processes, one per GPU, for `algoperf` and each trial of `slurm`
                         (default: 1)
  PIP_EXTRA_INDEX_URL    e.g. https://download.pytorch.org/whl/cpu for a CPU-only PyTorch
  WANDB_*                passed on to runs
END
}

die() {
  echo "error: $*" >&2
  exit 1
}

# Runs a command, or prints it so that it can be pasted into a shell.
run() {
  if "$DRY_RUN"; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v -- "$candidate"
      return
    fi
    [[ "$candidate" != "${PYTHON:-}" ]] || die "PYTHON=$PYTHON is not Python 3.11 or newer"
  done
  die "no Python 3.11 or newer on PATH: install one, or name it: PYTHON=/path/to/python ./run.sh"
}

# Deletes a virtual environment, and nothing that is none.
remove_venv() {
  [[ -e "$1" ]] || return 0
  if [[ ! -L "$1" && -d "$1" ]] && [[ -f "$1/pyvenv.cfg" || -z "$(ls -A -- "$1")" ]]; then
    rm -rf -- "$1"
  else
    die "$1 is in the way and no virtual environment: move it, or set VENV_DIR to another place"
  fi
}

# make_venv FOLDER: creates an empty one, unless a sound one is there.
make_venv() {
  local python
  if [[ -f "$1/.installing" ]] || ! "$1/bin/python" -m pip --version >/dev/null 2>&1; then
    remove_venv "$1"
    python="$(find_python)"
    mkdir -p -- "$(dirname -- "$1")" || die "cannot create $1: choose another place with VENV_DIR"
    "$python" -m venv "$1" >"$LOG" 2>&1 || {
      remove_venv "$1"
      die "$python cannot create a virtual environment ($(reason)): on Debian and Ubuntu run" \
        "'apt install python3-venv'"
    }
  fi
}

# The last telling line of the log.
reason() {
  if grep -qi 'no space left' "$LOG" 2>/dev/null; then
    echo "the disk is full"
  else
    { grep -E '^ *(ERROR|error|fatal|[A-Za-z]*Error):' "$LOG" || tail -n 1 "$LOG"; } 2>/dev/null |
      tail -n 1 | cut -c 1-200
  fi
}

require_writable() {
  [[ -n "$LOG" ]] || die "cannot write into $ROOT: copy the project to a folder you own"
}

check_disk() {
  local free
  free="$(df -Pk -- "$(dirname -- "$1")" | awk 'NR == 2 { print $4 }')"
  if [[ "$free" =~ ^[0-9]+$ ]] && ((free < NEEDED_KB)); then
    die "only $((free / 1000)) MB are free at $1, set-up needs $((NEEDED_KB / 1000)) MB: free" \
      "some space, or set VENV_DIR to another disk"
  fi
}

stamp() {
  cat -- "$@" | sha256sum | cut -c 1-16
}

# install FOLDER PIP-ARGUMENTS...: pip install, with one line if it fails.
install() {
  local venv="$1"
  shift
  "$venv/bin/python" -m pip install --quiet --no-compile "$@" >>"$LOG" 2>&1 ||
    die "installing packages failed ($(reason)): see $LOG, then run the same command again"
}

# locked COMMAND...: keeps a second set-up out until this one has ended.
locked() {
  LOG="$CACHE/setup.log"
  if ! { mkdir -p -- "$CACHE" && : >>"$CACHE/setup.lock"; } 2>/dev/null; then
    LOG="" # enough where everything is set up already
    "$@"
  elif command -v flock >/dev/null; then
    exec 9>"$CACHE/setup.lock"
    flock -n 9 || { echo "another set-up is running; waiting for it" >&2; flock 9; }
    "$@"
    exec 9>&-
  else
    "$@"
  fi
}

# The stamp is written last: a set-up that was interrupted has none and starts afresh.
setup_quickstart() {
  local want
  want="$(stamp "$ROOT/requirements/quickstart.txt" "$ROOT/requirements/no-deps.txt")"
  [[ "$(cat -- "$VENV/.stamp-quickstart" 2>/dev/null)" != "$want" || -f "$VENV/.installing" ]] || return 0
  require_writable
  check_disk "$VENV"
  echo "setting up Python packages in $VENV (a minute or two, once)" >&2
  make_venv "$VENV"
  touch "$VENV/.installing"
  rm -f -- "$VENV"/.stamp-*
  : >"$LOG"
  install "$VENV" -r "$ROOT/requirements/quickstart.txt"
  install "$VENV" --no-deps -r "$ROOT/requirements/no-deps.txt"
  rm -f -- "$VENV/.installing"
  echo "$want" >"$VENV/.stamp-quickstart"
}

# setup_more NAME PIP_OPTIONS...: the packages of requirements/NAME.txt, on top of the quickstart's.
setup_more() {
  local name="$1" want
  shift
  setup_quickstart
  want="$(stamp "$ROOT/requirements/$name.txt")"
  [[ "$(cat -- "$VENV/.stamp-$name" 2>/dev/null)" != "$want" ]] || return 0
  require_writable
  echo "setting up requirements/$name.txt in $VENV" >&2
  touch "$VENV/.installing"
  : >"$LOG"
  install "$VENV" "$@" -r "$ROOT/requirements/$name.txt"
  rm -f -- "$VENV/.installing"
  echo "$want" >"$VENV/.stamp-$name"
}

setup_slurm() { setup_more slurm; }

setup_experiments() { setup_more experiments --no-deps; }

setup_dev() {
  setup_slurm
  setup_more dev
}

# setup_algoperf SOURCE: AlgoPerf at the tested commit, in an environment with its own pins.
setup_algoperf() {
  local source="$1" clone="$CACHE/algoperf" want
  want="$ALGOPERF_COMMIT $(stamp "$ROOT/requirements/algoperf.txt")"
  [[ "$(cat -- "$ALGOPERF_VENV/.stamp-algoperf" 2>/dev/null)" != "$want" ]] || return 0
  require_writable
  command -v git >/dev/null || die "git is needed to get AlgoPerf: install it"
  if [[ "$(git -C "$clone" rev-parse HEAD 2>/dev/null)" != "$ALGOPERF_COMMIT" ]]; then
    echo "getting AlgoPerf ${ALGOPERF_COMMIT:0:8} from $source" >&2
    rm -rf -- "$clone" "$clone.partial"
    git clone --quiet --no-checkout -- "$source" "$clone.partial" >"$LOG" 2>&1 ||
      die "cannot clone $source ($(reason)): check the connection, or pass --algoperf-source" \
        "DIR with a clone that you have"
    git -C "$clone.partial" -c advice.detachedHead=false checkout --quiet "$ALGOPERF_COMMIT" \
      >"$LOG" 2>&1 || die "$source has no commit $ALGOPERF_COMMIT: update that clone"
    mv -- "$clone.partial" "$clone"
  fi
  check_disk "$ALGOPERF_VENV"
  echo "setting up AlgoPerf's packages in $ALGOPERF_VENV (several minutes and GB, once)" >&2
  make_venv "$ALGOPERF_VENV"
  touch "$ALGOPERF_VENV/.installing"
  : >"$LOG"
  # Older pips do not recognise extras whose names have underscores, and skip them.
  install "$ALGOPERF_VENV" --upgrade "$ALGOPERF_PIP"
  # Without a tag nearby AlgoPerf's build cannot work out its version.
  SETUPTOOLS_SCM_PRETEND_VERSION=0.6.0 install "$ALGOPERF_VENV" \
    "${clone}[${ALGOPERF_EXTRAS:-jax_cpu,pytorch_gpu,full}]" -r "$ROOT/requirements/algoperf.txt"
  rm -f -- "$ALGOPERF_VENV/.installing"
  echo "$want" >"$ALGOPERF_VENV/.stamp-algoperf"
}

ready() {
  if ! "$DRY_RUN"; then
    locked "setup_$1"
  fi
}

asks_help() {
  local argument
  for argument in "$@"; do
    [[ "$argument" != --help && "$argument" != -h ]] || return 0
  done
  return 1
}

cmd_quickstart() {
  if asks_help "$@" && [[ ! -x "$VENV/bin/python" ]]; then
    echo "usage: ./run.sh quickstart [FLAGS]; sets up, then runs python -m quickstart.study FLAGS"
    return
  fi
  ready quickstart
  run exec "$VENV/bin/python" -m quickstart.study "$@"
}

cmd_test() {
  if asks_help "$@"; then
    echo "usage: ./run.sh test [PYTEST ARGUMENTS]; for example ./run.sh test -m slow, ./run.sh test tests/kfac"
    return
  fi
  ready dev
  cd -- "$ROOT"
  run exec "$VENV/bin/python" -m pytest "$@"
}

cmd_setup() {
  local dev=false algoperf=false source="$ALGOPERF_URL"
  while (($#)); do
    case "$1" in
      --dev) dev=true ;;
      --algoperf) algoperf=true ;;
      --algoperf-source)
        [[ -d "${2:-}" ]] || die "--algoperf-source needs an existing folder with AlgoPerf's repository"
        algoperf=true source="$(cd -- "$2" && pwd)"
        shift
        ;;
      --help | -h)
        cat <<'END'
usage: ./run.sh setup [--dev] [--algoperf] [--algoperf-source DIR]

Sets up the quickstart: packages in .venv and the molecules in data/. Done once; a set-up that was
interrupted starts afresh.

  --dev                  also the packages for tests and checks
  --algoperf             also AlgoPerf at the tested commit, with its own pins, in .venv-algoperf
                         (clones its public repository; ALGOPERF_EXTRAS names its pip extras,
                         default jax_cpu,pytorch_gpu,full)
  --algoperf-source DIR  take AlgoPerf from a clone that you have
END
        return
        ;;
      *) die "setup knows no '$1'; it takes --dev, --algoperf, --algoperf-source DIR" ;;
    esac
    shift
  done
  if "$DRY_RUN"; then
    run python3 -m venv "$VENV"
    run "$VENV/bin/python" -m pip install -r "$ROOT/requirements/quickstart.txt"
    run "$VENV/bin/python" -m pip install --no-deps -r "$ROOT/requirements/no-deps.txt"
    if "$dev"; then
      run "$VENV/bin/python" -m pip install -r "$ROOT/requirements/slurm.txt"
      run "$VENV/bin/python" -m pip install -r "$ROOT/requirements/dev.txt"
    fi
    run "$VENV/bin/python" -m quickstart.molecules --data_dir="$ROOT/data"
    if "$algoperf"; then
      run git clone --no-checkout -- "$source" "$CACHE/algoperf"
      run git -C "$CACHE/algoperf" checkout "$ALGOPERF_COMMIT"
      run python3 -m venv "$ALGOPERF_VENV"
      run "$ALGOPERF_VENV/bin/python" -m pip install --upgrade "$ALGOPERF_PIP"
      run env SETUPTOOLS_SCM_PRETEND_VERSION=0.6.0 "$ALGOPERF_VENV/bin/python" -m pip install \
        "${CACHE}/algoperf[${ALGOPERF_EXTRAS:-jax_cpu,pytorch_gpu,full}]" -r "$ROOT/requirements/algoperf.txt"
    fi
    return
  fi
  ready quickstart
  if "$dev"; then ready dev; fi
  "$VENV/bin/python" -m quickstart.molecules --data_dir="$ROOT/data"
  if "$algoperf"; then
    locked setup_algoperf "$source"
  fi
  echo "set up; next: ./run.sh"
}

cmd_algoperf() {
  local python="$ALGOPERF_VENV/bin/python"
  if [[ ! -x "$python" ]]; then
    # An environment of the user's own that has AlgoPerf, such as the Docker image, will do.
    python="$(command -v python3 || command -v python || true)"
    if ! "$DRY_RUN" && ! asks_help "$@" && ! "$python" -c 'import algoperf' 2>/dev/null; then
      die "AlgoPerf is not set up: run ./run.sh setup --algoperf first"
    fi
  fi
  local nproc="${NPROC:-1}"
  [[ "$nproc" =~ ^[1-9][0-9]{0,3}$ ]] || die "NPROC=${nproc:0:20} is no number of processes: give 1 to 9999"
  cd -- "$ROOT"
  if ((nproc > 1)); then
    run exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc" \
      -m workloads_overrides.launch "$@"
  else
    run exec "$python" -m workloads_overrides.launch "$@"
  fi
}

cmd_slurm() {
  local python="$VENV/bin/python"
  if asks_help "$@" && [[ ! -x "$python" ]]; then
    echo "usage: ./run.sh slurm [OPTIONS] -- ARGUMENTS OF ./run.sh algoperf; --help tells more after set-up"
    return
  fi
  cd -- "$ROOT"
  if "$DRY_RUN" && [[ ! -f "$VENV/.stamp-quickstart" ]]; then
    run exec "$python" -m workloads_overrides.slurm "$@"
  elif "$DRY_RUN"; then
    # The commands of the trials, which are what matters.
    exec "$python" -m workloads_overrides.slurm --dry-run "$@"
  else
    ready slurm
    exec "$python" -m workloads_overrides.slurm "$@"
  fi
}

cmd_compare() {
  ready quickstart
  run exec "$VENV/bin/python" -m steps_to_target "$@"
}

cmd_experiments() {
  if [[ "${1:-}" == marginal_likelihood || "${1:-}" == optimizers || "${1:-}" == all ]]; then
    ready experiments
  else
    ready quickstart
  fi
  # --paper --slurm sends its runs through submitit.
  if [[ " $* " == *" --slurm"* ]]; then ready slurm; fi
  run exec "$VENV/bin/python" -m experiments "$@"
}

cmd_benchmarks() {
  ready experiments # which have the peers
  run exec "$VENV/bin/python" -m benchmarks "$@"
}

cmd_memory() {
  ready quickstart
  run exec "$VENV/bin/python" -m workloads_overrides.factor_memory "$@"
}

absolute() {
  [[ "$1" == /* ]] && echo "$1" || echo "$PWD/$1"
}

cmd_docker() {
  if asks_help "$@" || (($# == 0)); then
    cat <<'END'
usage: ./run.sh docker build [ARGUMENTS OF docker build]
       ./run.sh docker run COMMAND...

build makes the image (IMAGE, default kfac-algoperf). run runs a command of this script in it, with
all GPUs, the data of DATA_DIR (default ./data) at /data, and results in RUNS_DIR (default ./runs).
END
    return
  fi
  local action="$1" image="${IMAGE:-kfac-algoperf}" name data runs
  local -a wandb=()
  shift
  case "$action" in
    build) run docker build --tag "$image" "$@" "$ROOT" ;;
    run)
      (($#)) || die "docker run needs a command, for example: ./run.sh docker run algoperf --help"
      for name in $(compgen -e WANDB_ || true); do wandb+=(--env "$name"); done
      # A relative path would name one of Docker's own volumes; a missing one would belong to root.
      data="$(absolute "${DATA_DIR:-$ROOT/data}")" runs="$(absolute "${RUNS_DIR:-$ROOT/runs}")"
      [[ -d "$data" ]] || "$DRY_RUN" || die "DATA_DIR=$data: no such folder"
      run mkdir -p -- "$runs"
      run docker run --rm --init --gpus all --ipc=host --env NPROC "${wandb[@]}" \
        --volume "$data:/data" --volume "$runs:/runs" \
        "$image" "$@"
      ;;
    *) die "docker knows build and run, not '$action'" ;;
  esac
}

cmd_package() {
  local name="kfac" target
  if asks_help "$@"; then
    cat <<'END'
usage: ./run.sh package [FOLDER]

Writes external_tuning/kfac/ below FOLDER (default: dist): the submission, its search space,
requirements, licence and readme, as AlgoPerf's submissions repository expects them.
END
    return
  fi
  (($# <= 1)) || die "package takes one folder"
  target="${1:-$ROOT/dist}/external_tuning/$name"
  [[ ! -e "$target" ]] || die "$target exists: move it away first"
  run mkdir -p -- "$target"
  run cp -R -- "$ROOT/submission/." "$target/"
  run cp -- "$ROOT/tuning_search_space.json" "$ROOT/LICENSE" "$target/"
  run find "$target" -name __pycache__ -type d -prune -exec rm -rf -- '{}' +
  if ! "$DRY_RUN"; then
    printf '# Needs nothing beyond AlgoPerf and its PyTorch.\n' >"$target/requirements.txt"
    echo "$target"
  fi
}

main() {
  if [[ "${1:-}" == --dry-run ]]; then
    DRY_RUN=true
    shift
  fi
  local command="${1:-quickstart}"
  case "$command" in
    --help | -h | help)
      usage
      return
      ;;
    --*) command=quickstart ;;
    quickstart | test | setup | algoperf | slurm | compare | experiments | benchmarks | memory | docker | package)
      shift || true
      ;;
    *) die "no command '$command'; ./run.sh --help lists them" ;;
  esac
  if [[ "${1:-}" == --dry-run ]]; then
    DRY_RUN=true
    shift
  fi
  "cmd_$command" "$@"
}

main "$@"
