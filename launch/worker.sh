#!/usr/bin/env bash
# One worker of a run: what every launcher starts on every machine, task or pod.
#
#   bash launch/worker.sh install EXTRAS         Python, the virtual environment, the pinned versions
#   bash launch/worker.sh start MODULE ARG...    python -m univla_jax.MODULE ARG..., detached
#   bash launch/worker.sh run MODULE ARG...      the same in the foreground, output here too
#   bash launch/worker.sh stop                   SIGTERM to the command: it saves its step and ends
#   bash launch/worker.sh status                 one line: running, ended STATUS, stopped STATUS, lost, none
#   bash launch/worker.sh tail [LINES]           the end of the log, every line behind the host's name
#
# STATE (default: .run in the repository) gets pid, exit_status and log. STATE/env holds KEY=VALUE lines
# for the command; it may hold secrets and is read by its owner alone. NFS=SERVER:/SHARE is mounted at
# /mnt/shared by install. VENV and INSTALLED: see environment.sh.
set -uo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [[ -z "${STATE:-}" ]]; then
  STATE="$REPOSITORY/.run"
fi
STOP_SECONDS="${STOP_SECONDS:-600}" # how long stop waits for the command to save and end
PREEMPTED=83
PEER_LOST=84

usage() { sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

fail() {
  echo "error: $*" >&2
  exit 2
}

# The command and all its children inherit descriptor 9, so the lock is held for as long as any
# process of the run lives, and freed by the kernel whatever ends them: a process number in a file could be
# another process's by now, as after a reboot. File systems without locks answer with other statuses
# than 1; there the lock counts as free.
is_running() {
  [[ -e "$STATE/lock" ]] || return 1
  flock --nonblock "$STATE/lock" true
  [[ $? -eq 1 ]]
}

# wait_until_free SECONDS
wait_until_free() {
  flock --wait "$1" "$STATE/lock" true
  [[ $? -ne 1 ]]
}

# kill_leftover: ends what is left of an earlier run at once: two must not share a workdir.
kill_leftover() {
  if is_running; then
    kill -KILL -- "-$(cat "$STATE/group")" "$(cat "$STATE/pid")" 2>/dev/null
    wait_until_free 60 || fail "the earlier run in $STATE does not end; look at its processes"
  fi
}

# supervise MODULE ARG...: runs the command, passes SIGTERM and SIGINT on to it, and returns its status.
supervise() {
  local module="$1" asked="" child="" command
  shift
  status=1 # not local: the EXIT trap reads it
  command=("$PROJECT_PYTHON" -u -m "univla_jax.$module" "$@")
  # Whatever ends this script leaves the status behind; written beside and moved, so that it is never
  # read half.
  trap 'echo "$status" >"$STATE/exit_status.new" && mv "$STATE/exit_status.new" "$STATE/exit_status"' EXIT
  echo "$(date -u +%FT%TZ) $(uname -n): ${command[*]}"
  trap 'asked=1; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null' TERM INT HUP
  (
    if [[ -f "$STATE/env" ]]; then
      set -a
      source "$STATE/env"
      set +a
    fi
    cd "$REPOSITORY" && exec "${command[@]}"
  ) &
  child=$!
  echo "$child" >"$STATE/pid"
  [[ -z "$asked" ]] || kill -TERM "$child" 2>/dev/null
  # Not with one `wait`: a signal at the moment the command ends can leave bash waiting there for
  # tee, forever. A command that is over has been reaped, so its number answers no more.
  { while kill -0 "$child"; do sleep 0.2; done; } 2>/dev/null
  wait "$child"
  status=$?
  # Asked to stop before it listens to signals, the command has nothing to save yet.
  if [[ $status -eq 143 && (-n "$asked" || -e "$STATE/stopping") ]]; then
    status=$PREEMPTED
  fi
  # The coordination service of JAX aborts a process that waits in a collective for a lost peer;
  # its last words are on their way to the log for a moment.
  if [[ $status -eq 134 ]] && sleep 1 && tail -n 200 "$STATE/log" 2>/dev/null | grep -qiE \
      'coordination service|coordination_service|distributed service|heartbeat timeout'; then
    status=$PEER_LOST
  fi
  echo "$(date -u +%FT%TZ) $(uname -n): ended with status $status"
  return "$status"
}

# prepare: takes the lock of STATE, as descriptor 9.
prepare() {
  mkdir -p "$STATE"
  chmod 700 "$STATE"
  exec 9>"$STATE/lock"
  flock --nonblock 9
  if [[ $? -eq 1 ]]; then
    fail "a run is going on in $STATE; stop it first"
  fi
  rm -f "$STATE/exit_status" "$STATE/stopping" "$STATE/pid"
  echo "$BASHPID" >"$STATE/group"
}

run_here() {
  prepare
  : >"$STATE/log"
  # tee outlives the signals that end the command: its last lines matter most.
  exec > >(trap '' TERM INT HUP; exec 9>&-; exec tee -a "$STATE/log") 2>&1
  supervise "$@"
}

start_detached() {
  kill_leftover
  mkdir -p "$STATE"
  chmod 700 "$STATE"
  rm -f "$STATE/exit_status" "$STATE/pid"
  # A session of its own and no descriptor of ours: ssh returns at once and its end reaches nothing.
  setsid --fork env STATE="$STATE" bash "${BASH_SOURCE[0]}" background "$@" \
    >>"$STATE/log" 2>&1 </dev/null
  for ((i = 0; i < 100; i++)); do
    [[ -e "$STATE/exit_status" ]] && return
    [[ -e "$STATE/pid" ]] && is_running && return
    sleep 0.05
  done
  fail "the command did not start; see $STATE/log"
}

stop() {
  if is_running; then
    touch "$STATE/stopping"
    kill -TERM "$(cat "$STATE/pid")"
    wait_until_free "$STOP_SECONDS" || fail "the run still saves after $STOP_SECONDS s; ask again"
  fi
  status
}

status() {
  local word
  if is_running; then
    word="running"
  elif [[ -f "$STATE/exit_status" ]]; then
    word="$([[ -e "$STATE/stopping" ]] && echo stopped || echo ended) $(cat "$STATE/exit_status")"
  elif [[ -e "$STATE/pid" ]]; then
    word="lost" # killed together with the script that watches it, or the machine was started anew
  else
    word="none"
  fi
  echo "worker $(uname -n) $word"
}

install() {
  local extra="$1"
  # A new machine still runs its own updates: wait for their lock.
  local apt="sudo apt-get -qq -o DPkg::Lock::Timeout=600"
  if [[ -z "${INSTALLED:-}" ]] && ! find_python >/dev/null 2>&1; then
    $apt update && $apt install -y python3.11 python3.11-venv || return
  fi
  if [[ -n "${NFS:-}" ]] && ! mountpoint -q /mnt/shared; then
    $apt update && $apt install -y nfs-common && sudo mkdir -p /mnt/shared &&
      sudo mount -t nfs "$NFS" /mnt/shared || return
  fi
  # Pinned, so that a run that comes back on new machines is the run that left.
  LOCK="$REPOSITORY/launch/requirements.lock" install_project "$extra"
}

main() {
  local action="${1:-}"
  [[ $# -gt 0 ]] && shift
  case "$action" in
    install) [[ $# -eq 1 ]] || fail "install needs extras of setup.py"; install "$1" ;;
    start) [[ $# -gt 0 ]] || fail "start needs a command"; start_detached "$@" ;;
    background) prepare; supervise "$@" ;;
    run) [[ $# -gt 0 ]] || fail "run needs a command"; run_here "$@" ;;
    stop) stop ;;
    status) status ;;
    tail) [[ ! -e "$STATE/log" ]] || tail -n "${1:-1000}" "$STATE/log" | sed "s/^/$(uname -n) /" ;;
    -h | --help) usage ;;
    *) usage >&2; fail "expected install, start, run, stop, status or tail, got ${action:-nothing}" ;;
  esac
}

# In one line: bash reads a script while it runs it, and the checkout may be edited in the meantime.
main "$@"; exit
