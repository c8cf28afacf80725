#!/usr/bin/env bash
# The one door to this project: sets up what a command needs, then runs it. See ./run.sh --help.
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
VENV="$(realpath -ms -- "${VENV_DIR:-$ROOT/.venv}")"
ALGOPERF_VENV="$(realpath -ms -- "${ALGOPERF_VENV_DIR:-$ROOT/.venv-algoperf}")"
CACHE="$ROOT/.cache"
LOG="$CACHE/setup.log"
ALGOPERF_URL="https://github.com/mlcommons/algorithmic-efficiency.git"
ALGOPERF_COMMIT="2c90454fc05d5bdf3598b0c7651e611f132a7060"
DRY_RUN=false
MADE="" # environments that this call made
# Modules are this project's, whatever files the current folder holds.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONUNBUFFERED=1
# Packages are installed without bytecode; the first import writes it, and later ones take a third.
unset PYTHONDONTWRITEBYTECODE

usage() {
  cat <<'END'
usage: ./run.sh [--dry-run] [COMMAND] [ARGUMENTS]

  quickstart    compare K-FAC with tuned first-order methods on real molecules (the default)
  test          run the test suite
  setup         set up without running anything
  algoperf      train with AlgoPerf's own submission_runner
  slurm         send the trials of a study to a Slurm cluster, one job each
  compare       compare runs: steps-to-target and time-to-target
  experiments   tables and figures of the paper
  benchmarks    speed and memory
  gpu-check     all that can only be known on a GPU: tests and figures
  memory        what K-FAC's factors need of a V100 or an A100, for every AlgoPerf workload
  docs          build the documentation's pages into site/
  docker        build the image, or run a command in it
  package       write the folder that AlgoPerf's submissions repository expects

./run.sh COMMAND --help tells about a command. --dry-run prints the exact commands instead of
running them. Needs Linux, Python 3.11 or newer and access to a Python package registry. Packages
are installed with uv where it is on the PATH, else with pip; requirements/ pins each of them.

environment:
  PYTHON                 the Python to set up with (default: the first suitable one on PATH)
  VENV_DIR               where the packages go (default: .venv)
  NPROC                  number of processes, one per GPU, for `algoperf` and each trial of `slurm`
                         (default: 1)
  CUDA_VISIBLE_DEVICES   the GPUs to use, for `docker run` too
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
  if ! "$DRY_RUN"; then "$@"; else printf '%q ' "$@" && echo; fi
}

# Becomes a Python module of this project, with variables before it; a pasted one finds it, too.
become() {
  if "$DRY_RUN"; then run env PYTHONPATH="$ROOT" PYTHONSAFEPATH=1 "$@"; else exec env "$@"; fi
}

asks_help() { [[ "${1:-}" == --help || "${1:-}" == -h ]]; }

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

# The last telling line of the log.
reason() {
  if grep -qi 'no space left' "$LOG"; then
    echo "the disk is full"
  else
    { grep -E '^ *(ERROR|error|fatal|[A-Za-z]*Error):' "$LOG" || tail -n 1 "$LOG"; } | tail -n 1 | cut -c 1-200
  fi
}

# make_venv FOLDER: an empty environment, unless a sound one is there; deletes nothing that is none.
make_venv() {
  if [[ "$MADE" == *" $1 "* ]]; then return; fi
  if [[ ! -f "$1/.installing" ]] && "$1/bin/python" -c '' 2>/dev/null; then return; fi
  MADE+=" $1 "
  if [[ -e "$1" ]]; then
    [[ ! -L "$1" && ( -f "$1/pyvenv.cfg" || -z "$(ls -A -- "$1")" ) ]] ||
      die "$1 is in the way and no virtual environment: move it, or set VENV_DIR to another place"
    run rm -rf -- "$1"
  fi
  local python
  python="$(find_python)"
  run "$python" -m venv "$1" >>"${OUT:-$LOG}" 2>&1 ||
    die "$python cannot create a virtual environment ($(reason)): on Debian and Ubuntu run 'apt install python3-venv'"
}

# install FOLDER ARGUMENTS...: of `pip install`, with one line if it fails.
install() {
  local venv="$1" pip=("$1/bin/python" -m pip install --quiet --no-compile)
  shift
  if command -v uv >/dev/null; then pip=(uv pip install --quiet --python "$venv/bin/python"); fi
  run "${pip[@]}" "$@" >>"${OUT:-$LOG}" 2>&1 ||
    die "installing packages failed ($(reason)): see $LOG, then run the same command again"
}

# set_up FOLDER NAME FILES-AND-OPTIONS...: once; a set-up that was interrupted has no stamp.
set_up() {
  local venv="$1" stamp="$1/.stamp-$2" want file
  want="$(for file in "${@:3}"; do [[ ! -f "$file" ]] || cat -- "$file"; done | sha256sum | cut -c 1-16)"
  if [[ "$(cat -- "$stamp" 2>/dev/null)" == "$want" && ! -f "$venv/.installing" ]]; then return; fi
  if "$DRY_RUN"; then
    local OUT=/dev/stdout
  else
    { mkdir -p -- "$CACHE" && : >"$LOG"; } 2>/dev/null ||
      die "cannot write into $ROOT: copy the project to a folder you own"
    exec 9>"$CACHE/setup.lock"
    flock -n 9 || { echo "another set-up is running; waiting for it" >&2 && flock 9; }
    echo "setting up $2 in $venv (once)" >&2
  fi
  make_venv "$venv"
  "$DRY_RUN" || touch "$venv/.installing"
  install "$venv" "${@:3}"
  "$DRY_RUN" || { rm -f -- "$venv/.installing" && echo "$want" >"$stamp" && exec 9>&-; }
}

# ready NAMES...: packages of requirements/NAME.txt in the project's environment.
ready() {
  [[ -z "${KFAC_NO_SETUP:-}" ]] || return 0 # the image has everything
  local name file="$ROOT/requirements"
  set_up "$VENV" quickstart -r "$file/quickstart.txt"
  set_up "$VENV" no-deps --no-deps -r "$file/no-deps.txt"
  for name in "$@"; do
    case "$name" in
      experiments) set_up "$VENV" "$name" --no-deps -r "$file/$name.txt" ;;
      *) set_up "$VENV" "$name" -r "$file/$name.txt" ;;
    esac
  done
}

# AlgoPerf at the tested commit, in an environment with its own pins.
set_up_algoperf() {
  local source="$1" clone="$CACHE/algoperf" stamp="$ALGOPERF_VENV/.stamp-algoperf"
  [[ "$(cut -d ' ' -f 1 "$stamp" 2>/dev/null)" != "$ALGOPERF_COMMIT" ]] || return 0
  if [[ "$(git -C "$clone" rev-parse HEAD 2>/dev/null)" != "$ALGOPERF_COMMIT" ]]; then
    run rm -rf -- "$clone"
    run git clone --quiet --no-checkout -- "$source" "$clone" || die "cannot clone $source: pass --algoperf-source DIR with a clone that you have"
    run git -C "$clone" -c advice.detachedHead=false checkout --quiet "$ALGOPERF_COMMIT" || die "$source has no commit $ALGOPERF_COMMIT: update that clone"
  fi
  # Without a tag nearby AlgoPerf's build cannot work out its version.
  run export SETUPTOOLS_SCM_PRETEND_VERSION=0.6.0
  set_up "$ALGOPERF_VENV" algoperf-packages "${clone}[${ALGOPERF_EXTRAS:-jax_cpu,pytorch_gpu,full}]" \
    -r "$ROOT/requirements/algoperf.txt" -r "$ROOT/requirements/image.txt"
  "$DRY_RUN" || echo "$ALGOPERF_COMMIT" >"$stamp"
}

cmd_setup() {
  local names=() algoperf=false source="$ALGOPERF_URL"
  while (($#)); do
    case "$1" in
      --dev) names+=(slurm docs dev) ;;
      --wandb) names+=(wandb) ;;
      --docs) names+=(docs) ;;
      --algoperf) algoperf=true ;;
      --algoperf-source)
        [[ -d "${2:-}" ]] || die "--algoperf-source needs an existing folder with AlgoPerf's repository"
        algoperf=true source="$(cd -- "$2" && pwd)"
        shift
        ;;
      --help | -h)
        cat <<'END'
usage: ./run.sh setup [--dev] [--wandb] [--docs] [--algoperf] [--algoperf-source DIR]

Sets up the quickstart: packages in .venv and the molecules in data/. Done once; a set-up that was
interrupted starts afresh.

  --dev, --wandb, --docs  also the packages for tests and checks, for wandb, for `docs`
  --algoperf              also AlgoPerf at the tested commit, with its own pins, in .venv-algoperf
                          (clones its public repository; ALGOPERF_EXTRAS names its pip extras,
                          default jax_cpu,pytorch_gpu,full)
  --algoperf-source DIR   take AlgoPerf from a clone that you have
END
        return
        ;;
      *) die "setup knows no '$1'; it takes --dev, --wandb, --docs, --algoperf, --algoperf-source DIR" ;;
    esac
    shift
  done
  ready "${names[@]}"
  run "$VENV/bin/python" -m quickstart.molecules --data_dir="$ROOT/data"
  if "$algoperf"; then set_up_algoperf "$source"; fi
  "$DRY_RUN" || echo "set up; next: ./run.sh"
}

# start MODULE NEEDS ARGUMENTS...: a module of this project, its packages set up. Help needs none.
start() {
  local module="$1" needs="$2" python="$VENV/bin/python"
  shift 2
  if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    [[ -x "$python" ]] || python="$(find_python)"
    "$python" -m "$module" "$@" 2>/dev/null || echo "usage: ./run.sh ${COMMAND} ...; more after ./run.sh setup"
    return
  fi
  # shellcheck disable=SC2086 # a list of words
  "$DRY_RUN" || ready $needs
  become "$python" -m "$module" "$@"
}

# wandb's packages, where an argument names it.
for_wandb() { [[ "$*" != *wandb* ]] || echo wandb; }

cmd_quickstart() { start quickstart "$(for_wandb "$@")" "$@"; }
cmd_compare() { start steps_to_target "$(for_wandb "$@")" "$@"; }
cmd_benchmarks() { start benchmarks experiments "$@"; } # which have the peers
cmd_gpu-check() { start benchmarks "experiments dev" gpu-check "$@"; }
cmd_memory() { start workloads_overrides.factor_memory "" "$@"; }

cmd_slurm() {
  if "$DRY_RUN" && [[ -f "$VENV/.stamp-slurm" ]]; then
    # The commands of the trials, which are what matters.
    DRY_RUN=false && set -- --dry-run "$@"
  fi
  start workloads_overrides.slurm slurm "$@"
}

cmd_experiments() {
  local needs=""
  case "${1:-}" in
    marginal_likelihood | optimizers | all) needs=experiments ;;
  esac
  [[ " $* " != *" --slurm"* ]] || needs+=" slurm" # --paper --slurm sends its runs through submitit
  start experiments "$needs" "$@"
}

cmd_test() {
  if asks_help "$@"; then
    echo "usage: ./run.sh test [PYTEST ARGUMENTS]; for example ./run.sh test -m slow, ./run.sh test tests/kfac"
    return
  fi
  run cd -- "$ROOT"
  start pytest "slurm docs dev" -n 2 --dist worksteal "$@" # each test has one thread
}

cmd_docs() {
  if asks_help "$@"; then
    echo "usage: ./run.sh docs [ARGUMENTS OF mkdocs build]; writes site/"
    return
  fi
  run cd -- "$ROOT"
  export NO_MKDOCS_2_WARNING=1
  start mkdocs docs build --strict "$@"
}

cmd_algoperf() {
  local python="$ALGOPERF_VENV/bin/python"
  # An environment of the user's own that has AlgoPerf, such as the Docker image, will do.
  [[ -x "$python" ]] || python="$(command -v python3 || command -v python || true)"
  if ! "$DRY_RUN" && ! asks_help "$@" && ! "$python" -c 'import algoperf' 2>/dev/null; then
    die "AlgoPerf is not set up: run ./run.sh setup --algoperf first"
  fi
  become ${NPROC:+NPROC="$NPROC"} "$python" -m workloads_overrides.launch "$@"
}

cmd_docker() {
  if asks_help "$@" || (($# == 0)); then
    cat <<'END'
usage: ./run.sh docker build [ARGUMENTS OF docker build]
       ./run.sh docker run COMMAND...

build makes the image (IMAGE, default kfac-algoperf). run runs a command of this script in it, as
you, with all GPUs or those of CUDA_VISIBLE_DEVICES, the data of DATA_DIR (default ./data) at /data,
and everything that it writes in RUNS_DIR (default ./runs), which is /runs inside.
END
    return
  fi
  local action="$1" image="${IMAGE:-kfac-algoperf}" name data runs
  local -a given=()
  shift
  case "$action" in
    build) run docker build --tag "$image" "$@" "$ROOT" ;;
    run)
      (($#)) || die "docker run needs a command, for example: ./run.sh docker run algoperf --help"
      for name in $(compgen -e WANDB_ || true); do given+=(--env "$name"); done
      # Inside, the GPUs that are passed on are numbered from 0. An empty choice is none.
      if [[ -z "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        given+=(--gpus all)
      elif [[ -n "$CUDA_VISIBLE_DEVICES" ]]; then
        given+=(--gpus "\"device=$CUDA_VISIBLE_DEVICES\"")
      fi
      # A relative path would name one of Docker's own volumes; a missing one would belong to root.
      data="$(realpath -ms -- "${DATA_DIR:-data}")" runs="$(realpath -ms -- "${RUNS_DIR:-runs}")"
      [[ -d "$data" ]] || "$DRY_RUN" || die "DATA_DIR=$data: no such folder"
      run mkdir -p -- "$runs"
      run docker run --rm --init --ipc=host --user "$(id -u):$(id -g)" --env NPROC "${given[@]}" \
        --volume "$data:/data:ro" --volume "$runs:/runs" "$image" "$@"
      ;;
    *) die "docker knows build and run, not '$action'" ;;
  esac
}

cmd_package() {
  if asks_help "$@"; then
    cat <<'END'
usage: ./run.sh package [--ruleset external|self] [FOLDER]

Writes external_tuning/kfac/ or self_tuning/kfac/ below FOLDER (default: dist): the submission,
requirements, licence and readme, and for external tuning (the default) the search space, as
AlgoPerf's submissions repository expects them.
END
    return
  fi
  local ruleset=external
  if [[ "${1:-}" == --ruleset* ]]; then
    if [[ "$1" == --ruleset=* ]]; then ruleset="${1#*=}"; else ruleset="${2:-}" && shift; fi
    shift || true
  fi
  [[ "$ruleset" == external || "$ruleset" == self ]] || die "--ruleset is external or self, not '$ruleset'"
  (($# <= 1)) || die "package takes one folder"
  local target="${1:-$ROOT/dist}/${ruleset}_tuning/kfac"
  [[ ! -e "$target" ]] || die "$target exists: move it away first"
  run mkdir -p -- "$target"
  run cp -R -- "$ROOT/submission/." "$target/"
  run cp -- "$ROOT/LICENSE" "$target/"
  [[ "$ruleset" == self ]] || run cp -- "$ROOT/tuning_search_space.json" "$target/"
  run find "$target" -name __pycache__ -type d -prune -exec rm -rf -- '{}' +
  "$DRY_RUN" || { printf '# Needs nothing beyond AlgoPerf and its PyTorch.\n' >"$target/requirements.txt" && echo "$target"; }
}

if [[ "${1:-}" == --dry-run ]]; then DRY_RUN=true && shift; fi
COMMAND="${1:-quickstart}"
case "$COMMAND" in
  --help | -h | help) usage && exit ;;
  --*) COMMAND=quickstart ;;
  quickstart | test | setup | algoperf | slurm | compare | experiments | benchmarks | gpu-check | memory | docs | docker | package) shift || true ;;
  *) die "no command '$COMMAND'; ./run.sh --help lists them" ;;
esac
if [[ "${1:-}" == --dry-run ]]; then DRY_RUN=true && shift; fi
"cmd_$COMMAND" "$@"
