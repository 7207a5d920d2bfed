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

declare -A number_of=() # of the processes that run, by process id
for ((i = 0; i < processes; i++)); do
  command=("$PROJECT_PYTHON" -m "univla_jax.$module" "$@" --distributed
    --coordinator="localhost:$port" --processes="$processes" --process="$i")
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "${command[@]}"
    echo
    continue
  fi
  "${command[@]}" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  number_of[$!]="$i"
done
[[ -n "$dry_run" ]] && exit 0
trap 'kill -TERM "${!number_of[@]}" 2>/dev/null' TERM INT

# Kills the processes given when a minute has passed. Silent from the start: who reads the output of
# this script would otherwise wait for the timer, which keeps it open, instead of for the processes.
kill_in_a_minute() {
  exec >/dev/null 2>&1
  sleep 60 &
  trap 'kill "$!"; exit' TERM
  wait "$!"
  kill -KILL "$@"
}

status=0
while ((${#number_of[@]} > 0)); do
  wait -n -p pid "${!number_of[@]}"
  ended=$?
  [[ -z "${pid:-}" ]] && continue # a signal to this script, not the end of a process
  number="${number_of[$pid]}"
  unset "number_of[$pid]"
  ((ended == 0)) && continue
  echo "process $number ended with status $ended" >&2
  if ((status == 0)); then
    status="$ended"
    if ((ended != 83 && ${#number_of[@]} > 0)); then # 83: all of them were asked to stop
      kill_in_a_minute "${!number_of[@]}" &
      watchdog="$!"
    fi
  fi
done
[[ -n "${watchdog:-}" ]] && kill "$watchdog" 2>/dev/null
exit "$status"
