#!/usr/bin/env bash
# Start `spo-jax train CONFIG --distributed` on every worker of a slice, in the background.
#
#   PROJECT=... ZONE=... NAME=... tpu/launch.sh CONFIG [--KEY VALUE ...]
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ -n ${1:-} && ${1:-} != -* ]] || die "name a configuration: $(basename "$0") CONFIG [--KEY VALUE ...]"
CONFIG=$1
shift
slice_arguments
OUTPUT_DIR=${OUTPUT_DIR:-${STORE:-$SHARED}/runs/$(basename "$CONFIG" .yaml)}
# Checkpoints have to be the same files for every worker.
[[ $OUTPUT_DIR == "$SHARED"/* || $OUTPUT_DIR == gs://* ]] ||
  die "OUTPUT_DIR=$OUTPUT_DIR: name a folder that every worker sees, under $SHARED, or gs://..."
for word in "$@"; do
  [[ $word != --output[-_]dir* ]] || die "$word: set OUTPUT_DIR=FOLDER instead"
done

here=$(quoted env "SHARED=$SHARED" "STORE=$STORE")
command=$(quoted train "$CONFIG" --distributed --output-dir "$OUTPUT_DIR" "$@")
# First on all: a run that starts on some workers only would wait for the others until it times out.
on_workers all "$here $WORKER_SH ready $(quoted "$CONFIG")"
on_workers all "$here $WORKER_SH start $command"
say "started in $OUTPUT_DIR. Follow it: tpu/logs.sh; end it: tpu/stop.sh"
