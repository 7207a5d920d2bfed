# Sourced by the scripts beside it: an environment of its own for a simulator, and its smoke run.

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

# What a worker of the evaluation needs beside its simulator.
WORKER_PACKAGES=("etils[epath]>=1.9" "pillow>=10.3")

fail() {
  echo "error: $*" >&2
  exit 2
}

# help_of SCRIPT: prints the comment at its top.
help_of() {
  awk 'NR > 1 && !/^#/ {exit} NR > 1 {sub(/^# ?/, ""); print}' "$1"
}

# make_environment FOLDER: a virtual environment of Python 3.11, whose interpreter is $SIMULATOR_PYTHON.
make_environment() {
  local candidate python=""
  SIMULATOR_PYTHON="$1/bin/python"
  [[ -x "$SIMULATOR_PYTHON" ]] && return
  for candidate in ${SIMULATOR_BASE_PYTHON:-} python3.11 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; then
      python="$candidate"
      break
    fi
  done
  [[ -n "$python" ]] || fail "the simulator has wheels for Python 3.11 alone, and none is found; install it" \
    "(Debian 12: apt-get install python3.11 python3.11-venv; elsewhere: uv python install 3.11) or set" \
    "SIMULATOR_BASE_PYTHON=/path/to/python3.11"
  echo "making $1 with $("$python" --version)"
  "$python" -m venv "$1"
}

# install_packages NAME...: into the simulator's environment.
install_packages() {
  echo "installing $*"
  "$SIMULATOR_PYTHON" -m pip install --quiet "$@" "${WORKER_PACKAGES[@]}"
}

# import_from FOLDER...: what the environment imports beside its packages.
import_from() {
  printf '%s\n' "$@" >"$("$SIMULATOR_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/simulator.pth"
}

# smoke_run PYTHON ARGUMENTS...: a brief evaluation without a policy, in an empty folder.
smoke_run() {
  local python="$1" out
  shift
  install_project base
  out="$(mktemp -d)"
  (cd "$REPOSITORY" && JAX_PLATFORMS=cpu "$PROJECT_PYTHON" -m univla_jax.evaluate --policy=zero \
    --simulator_python="$python" --out="$out/smoke" "$@") ||
    fail "the smoke run failed; what the simulator printed is in $out/smoke/workers/0.log"
  rm -r "$out"
  echo "The simulator runs. Give evaluations --simulator_python=$python"
}
