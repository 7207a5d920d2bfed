#!/usr/bin/env bash
# Makes the environment and runs the tests.
#
#   bash launch/test.sh                  everything but the tests marked slow
#   bash launch/test.sh -m slow          the slow ones; all arguments go to pytest
#   bash launch/test.sh --dry_run ...    print the command, run nothing
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
dry_run=""
if [[ "${1:-}" == "--dry_run" ]]; then
  dry_run=echo
  shift
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

[[ -n "$dry_run" ]] || install_project test
cd "$REPOSITORY"
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3
if [[ $# -eq 0 ]]; then
  set -- -m "not slow"
fi
$dry_run "$PROJECT_PYTHON" -m pytest -n 2 --dist loadfile "$@"
