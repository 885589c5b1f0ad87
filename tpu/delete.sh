#!/usr/bin/env bash
# Give the slice back, and wait until it is gone. Runs and data on the shared folder stay; the
# workers' own disks, logs included, do not.
#
#   PROJECT=... ZONE=... NAME=... [FORCE=1] tpu/delete.sh
#
# While a run is going on it refuses; FORCE=1 deletes it under the run.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# -eq 0 ]] || die "takes no arguments, got $*"
slice_arguments
INTERVAL=${INTERVAL:-10}
whole INTERVAL
case ${FORCE:-0} in
  0 | 1) ;;
  *) die "FORCE=$FORCE: expected 1 (delete the slice even under a run) or 0" ;;
esac

if dry; then
  [[ ${FORCE:-0} == 1 ]] || on_workers all "$WORKER_SH idle"
  state=ACTIVE
else
  state=$(slice_state)
  if [[ -z $state ]]; then
    say "there is no queued resource $NAME: nothing to delete"
    exit
  fi
  if [[ $state == ACTIVE && ${FORCE:-0} == 0 ]]; then
    on_workers all "[ ! -e spo-jax/tpu/worker.sh ] || $WORKER_SH idle" ||
      die "a run is going on, or the workers do not answer: tpu/stop.sh first, or FORCE=1" 1
  fi
fi
run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
if dry; then
  wait_line '""'
  exit
fi
# A new slice cannot have the name before this one is gone.
for ((tries = 0; tries < 120; tries++)); do
  state=$(slice_state)
  [[ -n $state ]] || break
  say "waiting: $state"
  sleep "$INTERVAL"
done
[[ -z $state ]] || die "$NAME is still $state: look at it with tpu/status.sh, it may cost money" 1
say "$NAME is gone"
