#!/usr/bin/env bash
# Go on from the newest checkpoint of a run: the arguments it was launched with, and --resume.
# Where there is no checkpoint yet it starts from the beginning.
#
#   PROJECT=... ZONE=... NAME=... tpu/resume.sh CONFIG [--KEY VALUE ...]
set -euo pipefail

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$@" --resume
