#!/usr/bin/env bash
# Makes the environment and runs the tests.
#
#   bash launch/test.sh                  everything but the tests marked slow
#   bash launch/test.sh -m slow          the slow ones; all arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install_project test
cd "$REPOSITORY"
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3
if [[ $# -eq 0 ]]; then
  set -- -m "not slow"
fi
"$PROJECT_PYTHON" -m pytest -n 2 --dist loadfile "$@"
