#!/usr/bin/env bash
# SimplerEnv in an environment of its own, from a checkout of its simulator; no GPU, no root.
#
#   git clone https://github.com/simpler-env/ManiSkill2_real2sim MANISKILL
#   bash launch/simulators/simpler.sh MANISKILL [ENVIRONMENT]        (default: .venv-simpler in the repository)
#
# Needs Python 3.11 (SAPIEN 2.2.2 has no wheels for later ones). Without an NVIDIA GPU Mesa draws, which must be
# 24 or newer: on Debian 12 its package of bookworm-backports is unpacked into ENVIRONMENT, nothing is replaced.
# At the end zero actions run for five steps.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ $# -lt 1 || "$1" == --help || "$1" == -h ]]; then
  help_of "${BASH_SOURCE[0]}"
  exit $(($# < 1 ? 2 : 0))
fi
source_folder="$(realpath -m "$1")"
environment="$(realpath -m "${2:-$REPOSITORY/.venv-simpler}")"
for part in mani_skill2_real2sim/envs data/custom/models data/hab2_bench_assets/stages; do
  [[ -d "$source_folder/$part" ]] || fail "$source_folder has no $part; clone github.com/simpler-env/ManiSkill2_real2sim"
done

# unpack_backport FOLDER: Debian 12's packages of a newer Mesa, fetched and unpacked without root.
unpack_backport() {
  local apt=("-o" "Dir::Etc::sourcelist=$1/sources.list" "-o" "Dir::Etc::sourceparts=-"
    "-o" "Dir::State::lists=$1/lists" "-o" "Dir::Cache=$1/cache")
  mkdir -p "$1/lists/partial" "$1/cache/archives/partial" "$1/packages"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm-backports main" >"$1/sources.list"
  apt-get "${apt[@]}" update -qq
  (cd "$1/packages" && apt-get "${apt[@]}" download -qq libvulkan1 mesa-vulkan-drivers/bookworm-backports \
    libdrm2/bookworm-backports libdrm-amdgpu1/bookworm-backports)
  for package in "$1"/packages/*.deb; do
    dpkg -x "$package" "$1/root"
  done
  rm -r "$1/packages" "$1/lists" "$1/cache"
}

make_environment "$environment"
install_packages sapien==2.2.2 numpy==1.26.4 gymnasium==0.29.1 "scipy<1.18" transforms3d==0.4.2 "trimesh<6" "rtree<2" \
  "h5py<4" "imageio<3" tqdm pyyaml gitpython tabulate "ruckig<1" "setuptools<81"
# SAPIEN asks for the OpenCV that needs a display's libraries; NumPy 1 needs one before 4.12.
"$SIMULATOR_PYTHON" -m pip uninstall --quiet --yes opencv-python opencv-python-headless 2>/dev/null || true
install_packages "opencv-python-headless<4.12" numpy==1.26.4
import_from "$source_folder"

declare -A variables=([MS2_REAL2SIM_ASSET_DIR]="$source_folder/data")
if [[ ! -e /dev/nvidiactl ]]; then
  version="$(dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null || true)"
  libraries="/usr/lib/$(uname -m)-linux-gnu"
  if [[ -n "$version" ]] && dpkg --compare-versions "$version" ge 24; then
    driver="$libraries/libvulkan_lvp.so"
  elif grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release; then
    libraries="$environment/mesa/root$libraries"
    driver="$libraries/libvulkan_lvp.so"
    [[ -e "$driver" ]] || unpack_backport "$environment/mesa"
    variables[LD_LIBRARY_PATH]="$libraries"
  else
    fail "Mesa ${version:-is missing; it} has to be 24 or newer to draw without a GPU: apt-get install mesa-vulkan-drivers" \
      "(Ubuntu 24.04 has it in noble-updates)"
  fi
  missing="$(LD_LIBRARY_PATH="$libraries" ldd "$driver" | awk '/not found/ {print $1}' | tr '\n' ' ')"
  [[ -z "$missing" ]] || fail "$driver needs $missing: apt-get install libllvm15 libwayland-client0 libx11-xcb1 libxshmfence1" \
    "libxcb-dri3-0 libxcb-present0 libxcb-randr0 libxcb-shm0 libxcb-sync1 libxcb-xfixes0 libelf1"
  echo "{\"file_format_version\": \"1.0.0\", \"ICD\": {\"library_path\": \"$driver\", \"api_version\": \"1.3.0\"}}" >"$environment/lavapipe.json"
  variables[VK_ICD_FILENAMES]="$environment/lavapipe.json"
  # SAPIEN asks every Vulkan driver for an extension that only its CUDA interface uses and Mesa's lacks; of the
  # same name without the ending "_fd" all drivers have one.
  "$SIMULATOR_PYTHON" - <<'PATCH'
import importlib.util
import pathlib

library = pathlib.Path(importlib.util.find_spec("sapien").origin).parents[1] / "sapien.libs/libsapien.so"
wanted, known = b"VK_KHR_external_semaphore_fd\0", b"VK_KHR_external_semaphore\0\0\0\0"
code = library.read_bytes()
if known not in code:
    assert code.count(wanted) == 1, f"{library}: not SAPIEN 2.2.2"
    library.write_bytes(code.replace(wanted, known))
PATCH
fi

# An interpreter that sets what the libraries read when a process begins.
wrapper="$environment/simulator_python"
{
  echo '#!/bin/sh'
  for name in "${!variables[@]}"; do
    printf 'export %s=%q\n' "$name" "${variables[$name]}"
  done
  printf 'exec %q "$@"\n' "$SIMULATOR_PYTHON"
} >"$wrapper"
chmod +x "$wrapper"
smoke_run "$wrapper" --benchmark=simpler --tasks=1 --episodes_per_task=1 --max_steps=5
