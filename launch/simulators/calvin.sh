#!/usr/bin/env bash
# CALVIN in an environment of its own, from a checkout of its repository; no data set, no GPU, no root.
#
#   git clone --recurse-submodules https://github.com/mees/calvin CALVIN
#   bash launch/simulators/calvin.sh CALVIN [ENVIRONMENT]        (default: .venv-calvin in the repository)
#
# It needs Python 3.11 (pybullet has no wheels for later ones). At the end zero actions run for ten steps.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ $# -lt 1 || "$1" == --help || "$1" == -h ]]; then
  help_of "${BASH_SOURCE[0]}"
  exit $(($# < 1 ? 2 : 0))
fi
source_folder="$(realpath -m "$1")"
environment="$(realpath -m "${2:-$REPOSITORY/.venv-calvin}")"
for part in calvin_models/calvin_agent calvin_models/conf calvin_env/calvin_env calvin_env/data; do
  [[ -d "$source_folder/$part" ]] || fail "$source_folder has no $part; clone github.com/mees/calvin with --recurse-submodules"
done

make_environment "$environment"
install_packages pybullet==3.2.7 hydra-core==1.3.8 omegaconf==2.3.1 "numpy>=1.26" "scipy>=1.12"
import_from "$source_folder/calvin_env" "$source_folder/calvin_models"

renderer=egl
if ! "$SIMULATOR_PYTHON" -c 'import ctypes, sys; ctypes.CDLL("libEGL.so.1")' 2>/dev/null; then
  renderer=tiny
  echo "There is no EGL to draw as CALVIN's authors do (apt-get install libegl1 libgl1 libgl1-mesa-dri):" \
    "pybullet's own renderer draws, --renderer=tiny, whose pictures differ."
fi
smoke_run "$SIMULATOR_PYTHON" --benchmark=calvin --tasks=23 --max_steps=10 --renderer="$renderer"
