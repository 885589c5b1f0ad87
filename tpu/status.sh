#!/usr/bin/env bash
# What the slice and the run on each worker are doing.
#
#   PROJECT=... ZONE=... NAME=... tpu/status.sh
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# -eq 0 ]] || die "takes no arguments, got $*"
slice_arguments
if dry; then
  quoted gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" '--format=value(state)'
  quoted gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" \
    '--format=value(state,acceleratorType,health)'
  on_workers all "$WORKER_SH status"
  exit
fi
state=$(slice_state)
if [[ -z $state ]]; then
  say "there is no queued resource $NAME in $ZONE of $PROJECT"
  exit
fi
# `state` whole: after a failure it says why.
gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='value(state)'
if [[ $state == ACTIVE ]]; then
  gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" \
    --format='value(state,acceleratorType,health)'
  on_workers all "$WORKER_SH status"
fi
