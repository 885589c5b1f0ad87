#!/usr/bin/env bash
# End the run on all workers: SIGTERM, then wait until it has saved. Resume it: tpu/resume.sh.
#
#   PROJECT=... ZONE=... NAME=... [GRACE=600] tpu/stop.sh
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# -eq 0 ]] || die "takes no arguments, got $*"
slice_arguments
GRACE=${GRACE:-600}
whole GRACE
on_workers all "$WORKER_SH stop $GRACE"
say "the slice still costs money: tpu/delete.sh gives it back"
