#!/usr/bin/env bash
# Follow the log of a run on one worker (0, or the one named) or on all.
#
#   PROJECT=... ZONE=... NAME=... [LOG_LINES=50] tpu/logs.sh [WORKER | all]
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# -le 1 ]] || die "expected one worker (0, 1, ... or all), got $*"
worker=${1:-0}
[[ $worker == all || $worker =~ ^[0-9]+$ ]] || die "worker $worker: expected 0, 1, ... or all"
slice_arguments
LOG_LINES=${LOG_LINES:-50}
whole LOG_LINES
on_workers "$worker" "$WORKER_SH log $LOG_LINES"
