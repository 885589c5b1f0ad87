#!/usr/bin/env bash
# What the scripts of this folder share. Sourced by them, not run.
#
# DRY_RUN=1 makes every script print the commands it would run, quoted so that they can be
# pasted, and run none of them. Remarks start with #.
# shellcheck disable=SC2034  # used by those that source this
set -euo pipefail

TPU=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SHARED=${SHARED:-/mnt/shared}
STORE=${STORE:-}
STORE=${STORE%/}
WORKER_SH='bash spo-jax/tpu/worker.sh'

die() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit "${2:-2}"
}

[[ -z $STORE || $STORE == gs://?* ]] || die "STORE=$STORE: expected gs://BUCKET/PATH"

case ${DRY_RUN:-0} in
  0) dry() { false; } ;;
  1) dry() { true; } ;;
  *) die "DRY_RUN=$DRY_RUN: expected 1 (print the commands, run none) or 0" ;;
esac

say() {
  if dry; then printf '# %s\n' "$*"; else printf '%s\n' "$*"; fi
}

# need VARIABLE MEANING: an environment variable that has no default.
need() {
  [[ -n ${!1:-} ]] || die "set $1 to $2"
}

# whole VARIABLE: it has to be a whole number.
whole() {
  [[ ${!1} =~ ^[0-9]+$ ]] || die "$1=${!1}: expected a whole number"
}

# The words as one line that a shell reads as these words.
quoted() {
  local word line=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      line+=("$word")
    else
      line+=("'${word//\'/\'\\\'\'}'")
    fi
  done
  printf '%s\n' "${line[*]}"
}

run() {
  if dry; then quoted "$@"; else "$@"; fi
}

# Project, zone and name of the slice, as every gcloud command wants them.
slice_arguments() {
  need PROJECT "the Google Cloud project"
  need ZONE "the zone of the slice, such as us-west4-a"
  need NAME "the name of the slice and of its queued resource"
  [[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    die "NAME=$NAME: lower case letters, digits and hyphens, a letter first"
  WHERE=(--project="$PROJECT" --zone="$ZONE")
}

# on_workers WORKER COMMAND: a shell command on worker 0, 1, ... or on all of them at once.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker="$1" --command="$2"
}

# State of the queued resource; nothing where there is none. Any other failure (credentials,
# network, a wrong project) is one here too: read as "none", it would start a second slice.
slice_state() {
  local errors output
  errors=$(mktemp)
  if output=$(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
    --format='value(state.state)' 2>"$errors"); then
    rm -f "$errors"
    printf '%s\n' "$output"
  elif grep -q NOT_FOUND "$errors"; then
    rm -f "$errors"
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
}

# wait_line STATE: in a dry run, the wait for a state as a command to paste.
wait_line() {
  # shellcheck disable=SC2016
  printf 'until [ "$(%s)" = %s ]; do sleep %s; done\n' \
    "$(quoted gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
      '--format=value(state.state)')" "$1" "$INTERVAL"
}
