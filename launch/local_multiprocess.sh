#!/usr/bin/env bash
# Runs N real processes of a command on this machine, joined by jax.distributed (CPU collectives).
#
#   bash launch/local_multiprocess.sh N train --config=FILE.py:NAME --workdir=DIR [--config.a=b ...]
#   bash launch/local_multiprocess.sh --dry_run N train ...       print the commands, run nothing
#
# Every process gets one CPU device. Their output is prefixed by their number. The exit status is the
# first one that is not 0; then the others have a minute to stop by themselves. SIGTERM and Ctrl-C go
# to all of them.   PORT=12345 sets the port of process 0 (default: a free one).
set -uo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  usage
  exit 0
fi
dry_run=""
if [[ "${1:-}" == "--dry_run" ]]; then
  dry_run=1
  shift
fi
if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "error: expected a number of processes and a command, got: $*" >&2
  usage >&2
  exit 2
fi
processes="$1"
module="$2"
shift 2

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [[ -z "$dry_run" ]]; then
  install_project base || exit 2
  port="${PORT:-$("$PROJECT_PYTHON" -c 'import socket
s = socket.socket()
s.bind(("localhost", 0))
print(s.getsockname()[1])')}"
else
  port="${PORT:-12345}"
fi
cd "$REPOSITORY"
export JAX_PLATFORMS=cpu

pids=()
for ((i = 0; i < processes; i++)); do
  command=("$PROJECT_PYTHON" -m "univla_jax.$module" "$@" --distributed
    --coordinator="localhost:$port" --processes="$processes" --process="$i")
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "${command[@]}"
    echo
    continue
  fi
  "${command[@]}" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=("$!")
done
[[ -n "$dry_run" ]] && exit 0
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

status=0
left="$processes"
while ((left > 0)); do
  wait -n "${pids[@]}"
  ended=$?
  running=()
  for pid in "${pids[@]}"; do
    kill -0 "$pid" 2>/dev/null && running+=("$pid")
  done
  pids=("${running[@]}")
  ((${#pids[@]} == left)) && continue # a signal to this script, not the end of a process
  left="${#pids[@]}"
  if ((ended != 0 && status == 0)); then
    status="$ended"
    if ((ended != 83 && left > 0)); then # 83: all of them were asked to stop
      (sleep 60 && kill -KILL "${pids[@]}" 2>/dev/null) &
      watchdog="$!"
    fi
  fi
done
[[ -n "${watchdog:-}" ]] && kill "$watchdog" 2>/dev/null
exit "$status"
