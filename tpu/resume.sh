#!/usr/bin/env bash
# Go on from the newest checkpoint of a run: the arguments it was launched with, and --resume.
#
#   PROJECT=... ZONE=... NAME=... tpu/resume.sh configs/quickstart.yaml [--KEY VALUE ...]
set -euo pipefail

: "${PROJECT:?set PROJECT to the Google Cloud project}"
: "${ZONE:?set ZONE to the zone of the slice}"
: "${NAME:?set NAME to the name given to tpu/create.sh}"
: "${1:?name the configuration that the run was launched with: tpu/resume.sh CONFIG ...}"

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$@" --resume
