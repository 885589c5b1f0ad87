#!/usr/bin/env bash
# Write a run's policy as a Hugging Face folder on a worker, and copy it here.
#
#   PROJECT=... ZONE=... NAME=... tpu/fetch.sh RUN LOCAL_FOLDER [--step N] [--dtype bfloat16]
#
# RUN is a folder every worker sees, such as /mnt/shared/runs/x/preference, or gs://... The export runs on the
# CPU of worker 0: alone, one worker of several cannot use the TPU.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# -ge 2 && $1 != -* && $2 != -* ]] || die "expected RUN LOCAL_FOLDER [--step N] [--dtype TYPE]"
RUN=$1 LOCAL=$2
shift 2
slice_arguments
[[ $RUN == "$SHARED"/* || $RUN == gs://* ]] || die "RUN=$RUN: name a folder under $SHARED, or gs://..."
[[ ! -e $LOCAL ]] || die "$LOCAL exists already: name a folder to be made"
exports=$SHARED/exports
[[ $RUN != gs://* ]] || exports=spo-exports # on the worker's own disk
exported=$exports/$(basename "$(dirname "$RUN")")-$(basename "$RUN")

export_command=$(quoted env JAX_PLATFORMS=cpu spo-venv/bin/spo-jax export "$RUN" "$exported" "$@")
on_workers 0 "mkdir -p $(quoted "$exports") && $export_command"
run gcloud compute tpus tpu-vm scp --recurse "$NAME:$exported" "$LOCAL" "${WHERE[@]}" --worker=0
say "$LOCAL is a folder that transformers loads; it also lies in $exported"
