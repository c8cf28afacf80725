# shellcheck shell=bash
# Virtual environments and what is in them, for run.sh. Needs its ROOT, VENV, ALGOPERF_VENV, DRY_RUN,
# run and die.

CACHE="$ROOT/.cache"
LOG="$CACHE/setup.log"
ALGOPERF_URL="https://github.com/mlcommons/algorithmic-efficiency.git"
ALGOPERF_COMMIT="2c90454fc05d5bdf3598b0c7651e611f132a7060"
MADE="" # environments that this call made

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
