#!/usr/bin/env bash
# See a run through on a slice that may be taken away: pre-empted -> delete, create, resume; a
# process that fell over -> resume. Ends with the run, or at its limits.
#
#   PROJECT=... ZONE=... NAME=... BUCKET=... SPOT=1 tpu/watch.sh CONFIG [--KEY VALUE ...]
#
# CONFIG and keys as for tpu/launch.sh, the environment as for tpu/create.sh too. Exit status: 0 the
# run is done (or tpu/stop.sh ended it), 2 the run refused its input, 3 a limit was reached.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ -n ${1:-} && ${1:-} != -* ]] || die "name the configuration: watch.sh CONFIG [--KEY VALUE ...]"
slice_arguments
INTERVAL=${INTERVAL:-60}
MAX_RESUMES=${MAX_RESUMES:-20} # restarts of any kind
MAX_HOURS=${MAX_HOURS:-168}
PATIENCE=${PATIENCE:-5} # unanswered questions in a row that are put up with
for limit in INTERVAL MAX_RESUMES MAX_HOURS PATIENCE; do whole "$limit"; done
case ${DELETE_WHEN_DONE:-0} in
  0 | 1) ;;
  *) die "DELETE_WHEN_DONE=$DELETE_WHEN_DONE: expected 1 (give the slice back at the end) or 0" ;;
esac

if dry; then
  say "every $INTERVAL seconds:"
  quoted gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
    '--format=value(state.state)'
  on_workers 0 "$WORKER_SH status"
  say "where the run fell over:"
  "$TPU/resume.sh" "$@"
  say "where the slice was taken away:"
  FORCE=1 "$TPU/delete.sh"
  "$TPU/create.sh"
  "$TPU/resume.sh" "$@"
  if [[ ${DELETE_WHEN_DONE:-0} == 1 ]]; then
    say "when the run is done:"
    "$TPU/delete.sh"
  fi
  exit
fi

resumes=0 unanswered=0 ended_by_signal=0

# again WHY: counts a restart.
again() {
  ((++resumes <= MAX_RESUMES)) || finish 3 "$1, after $MAX_RESUMES restarts (MAX_RESUMES)"
  unanswered=0 ended_by_signal=0
  say "restart $resumes of at most $MAX_RESUMES: $1"
}

finish() {
  say "$2"
  if [[ ${DELETE_WHEN_DONE:-0} == 1 ]]; then
    "$TPU/delete.sh" || say "could not delete $NAME: it costs money"
  else
    say "$NAME is left as it is and may cost money: tpu/delete.sh gives it back"
  fi
  exit "$1"
}

# What fails on the way (pre-empted again, say) is seen, and counted, at the next look.
resume() { "$TPU/resume.sh" "$@" || say "could not resume"; }
rebuild() {
  if FORCE=1 "$TPU/delete.sh" && "$TPU/create.sh"; then resume "$@"; else say "could not rebuild"; fi
}

# A slice that is ACTIVE: what the run on worker 0 is doing, and what that calls for.
look_at_run() {
  local found
  found=$(on_workers 0 "$WORKER_SH status" | sed -n 's/^spo-jax: //p' | tail -n 1) || found=
  case $found in
    'exited 0') finish 0 "the run is done" ;;
    'exited 2') finish 2 "the run refused its input (exit status 2): see tpu/logs.sh" ;;
    stopped*) finish 0 "the run was ended by tpu/stop.sh (it $found)" ;;
    running*) unanswered=0 ended_by_signal=0 ;;
    'exited 143')
      # Most likely the slice is about to go: a second look before it is resumed here.
      if ((ended_by_signal++)); then
        again "the run was ended by SIGTERM"
        resume "$@"
      fi
      ;;
    '')
      ((++unanswered < PATIENCE)) || give_up_on_silence "$@"
      ;;
    *)
      again "the run: $found"
      resume "$@"
      ;;
  esac
}

# Worker 0 does not answer. A node that is gone is replaced; one that is well is not deleted under a
# run that may be well too, only because this machine cannot reach it.
give_up_on_silence() {
  local node
  node=$(gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" --format='value(state)') || node=
  case $node in
    PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING | HIDDEN | HIDING)
      again "the node is $node"
      rebuild "$@"
      ;;
    *) finish 3 "worker 0 gave no answer $PATIENCE times, and the node is ${node:-unknown}" ;;
  esac
}

failures=0
while ((SECONDS < 3600 * MAX_HOURS)); do
  if state=$(slice_state); then
    failures=0
    case $state in
      ACTIVE) look_at_run "$@" ;;
      SUSPENDED | '')
        again "the slice is ${state:-not there}"
        rebuild "$@"
        ;;
      FAILED) finish 3 "the request for the slice FAILED: tpu/status.sh says why" ;;
      *) say "the slice is $state" ;;
    esac
  else
    ((++failures < PATIENCE)) || finish 3 "gcloud failed $PATIENCE times in a row"
  fi
  sleep "$INTERVAL"
done
finish 3 "$MAX_HOURS hours are over (MAX_HOURS)"
