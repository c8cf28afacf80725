#!/usr/bin/env bash
# The one door to this project: sets up what a command needs, then runs it. See ./run.sh --help.
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
VENV="$(realpath -ms -- "${VENV_DIR:-$ROOT/.venv}")"
ALGOPERF_VENV="$(realpath -ms -- "${ALGOPERF_VENV_DIR:-$ROOT/.venv-algoperf}")"
DRY_RUN=false
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

# shellcheck source=requirements/environments.sh
source "$ROOT/requirements/environments.sh"

asks_help() { [[ "${1:-}" == --help || "${1:-}" == -h ]]; }

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

cmd_package() { # any Python will do
  local python
  python="$(find_python)"
  become "$python" -m workloads_overrides.package "$@"
}

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
