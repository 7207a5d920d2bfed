# Sourced by the other scripts: finds Python, makes the virtual environment, installs the project.
#
#   PYTHON=python3.12   the interpreter to use (default: the first of python3, 3.12, 3.11, 3.13 that fits)
#   VENV=folder         the virtual environment (default: .venv in the repository)
#   INSTALLED=python    an interpreter that has the project already; nothing is installed then
#   LOCK=file           pinned versions to install, such as launch/requirements.lock (default: the newest)

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$REPOSITORY/.venv}"
PROJECT_PYTHON="${INSTALLED:-$VENV/bin/python}"

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.12 python3.11 python3.13; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
        >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11, 3.12 or 3.13 with the venv module found; install one" \
    "(Debian: apt-get install python3 python3-venv) or set PYTHON=/path/to/python" >&2
  return 2
}

# install_project EXTRAS: installs the project unless that was done already; "base" means no extras.
install_project() {
  local extras="$1" python stamp wanted pins=()
  if [[ -n "${INSTALLED:-}" ]]; then
    return
  fi
  [[ -z "${LOCK:-}" ]] || pins=(--constraint "$LOCK")
  stamp="$VENV/installed-$extras"
  wanted="$(cat "$REPOSITORY/setup.py" ${LOCK:+"$LOCK"} | cksum) $REPOSITORY"
  if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    return
  fi
  if [[ ! -x "$PROJECT_PYTHON" ]]; then
    python="$(find_python)" || return 2
    echo "making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV"
  fi
  echo "installing univla_jax ($extras) (several minutes on a first run)"
  "$PROJECT_PYTHON" -m pip install --quiet --upgrade pip
  # Joined by &&, so that a failure is one where a caller goes on without the extras as well.
  "$PROJECT_PYTHON" -m pip install --quiet ${pins[@]+"${pins[@]}"} --editable "$REPOSITORY$([[ $extras == base ]] || echo "[$extras]")" &&
    echo "$wanted" >"$stamp"
}
