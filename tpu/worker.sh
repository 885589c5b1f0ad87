#!/usr/bin/env bash
# On a worker: start, watch and stop the run there. The other scripts call it through gcloud.
#
#   worker.sh ready CONFIG    fails where a run cannot be started
#   worker.sh idle            fails while a run is going on
#   worker.sh start ARGUMENTS...  starts `spo-jax ARGUMENTS...` in the background
#   worker.sh status          prints one line, "spo-jax: " and none | running PID | exited STATUS |
#                             stopped STATUS (by worker.sh stop) | lost (gone without a status)
#   worker.sh stop SECONDS    SIGTERM, then waits until the run has saved and ended
#   worker.sh log LINES       the log, followed
set -euo pipefail

TPU=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SHARED=${SHARED:-/mnt/shared}
STORE=${STORE:-}
SPO_JAX=${SPO_JAX:-$HOME/spo-venv/bin/spo-jax}
STATE=${STATE:-$HOME/spo-jax-run}

die() {
  echo "$(hostname): $1" >&2
  exit 1
}

# A number alone does not do: after a restart of the machine it may be another process's.
alive() {
  [[ -s $STATE/pid ]] && ps -o args= -p "$(<"$STATE/pid")" 2>/dev/null | grep -q spo-jax
}

status() {
  if alive; then
    echo "spo-jax: running $(<"$STATE/pid")"
  elif [[ -s $STATE/status && -e $STATE/stopped ]]; then
    echo "spo-jax: stopped $(<"$STATE/status")"
  elif [[ -s $STATE/status ]]; then
    echo "spo-jax: exited $(<"$STATE/status")"
  elif [[ -e $STATE/pid ]]; then
    echo "spo-jax: lost"
  else
    echo "spo-jax: none"
  fi
}

ready() {
  if alive; then
    die "a run is going on here already ($(<"$STATE/pid")): stop it first (tpu/stop.sh)"
  fi
  [[ -n $STORE ]] || mountpoint -q "$SHARED" || die "$SHARED is not mounted: run tpu/create.sh again"
  cd "$TPU/.."
  [[ -f $1 ]] || die "no configuration $1 here: tpu/create.sh copies what is committed; or name \
one under $SHARED"
}

# Runs in the background, to keep the exit status. It outlives a SIGTERM to the whole session (a
# machine that shuts down); `trap :` rather than '' because the run would inherit the latter.
attend() {
  trap : TERM HUP
  "$SPO_JAX" "$@" &
  local run=$! status=0
  echo "$run" >"$STATE/pid"
  wait "$run" || status=$?
  while kill -0 "$run" 2>/dev/null; do
    status=0
    wait "$run" || status=$?
  done
  echo "$status" >"$STATE/status"
}

start() {
  alive && die "a run is going on here already: stop it first (tpu/stop.sh)"
  mkdir -p "$STATE"
  rm -f "$STATE/pid" "$STATE/status" "$STATE/stopped"
  cd "$TPU/.."
  # shellcheck source=tpu/env.sh
  source "$TPU/env.sh"
  echo "== $(date -u +%Y-%m-%dT%H:%M:%SZ) $*" >>"$STATE/log"
  nohup setsid bash "$TPU/worker.sh" attend "$@" >>"$STATE/log" 2>&1 </dev/null &
  for _ in {1..50}; do
    [[ -s $STATE/pid ]] && break
    sleep 0.1
  done
  status
}

stop() {
  if alive; then
    : >"$STATE/stopped"
    kill -TERM "$(<"$STATE/pid")"
    for ((waited = 0; waited < $1 * 2; waited++)); do
      alive || break
      sleep 0.5
    done
    alive && die "still saving after $1 seconds: wait and look again, or raise GRACE"
    # The status is written just after the process has gone.
    for _ in {1..50}; do
      [[ -s $STATE/status ]] && break
      sleep 0.1
    done
  fi
  status
}

case ${1:-} in
  ready) ready "${2:?name the configuration}" ;;
  idle) if alive; then die "a run is going on here: stop it first (tpu/stop.sh)"; fi ;;
  start) start "${@:2}" ;;
  attend) attend "${@:2}" ;;
  status) status ;;
  stop) stop "${2:?say how many seconds to wait}" ;;
  log) tail -n "${2:?say how many lines}" -F "$STATE/log" ;;
  *) die "worker.sh ${1:-}: expected ready, idle, start, status, stop or log" ;;
esac
