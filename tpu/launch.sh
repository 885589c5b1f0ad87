#!/usr/bin/env bash
# Start `spo-jax train CONFIG` on every worker of a slice, in the background.
#
#   PROJECT=... ZONE=... NAME=... tpu/launch.sh configs/quickstart.yaml [--KEY VALUE ...]
set -euo pipefail

: "${PROJECT:?set PROJECT to the Google Cloud project}"
: "${ZONE:?set ZONE to the zone of the slice}"
: "${NAME:?set NAME to the name given to tpu/create.sh}"
CONFIG=${1:?name a configuration: tpu/launch.sh CONFIG [--KEY VALUE ...]}
shift
SHARED=${SHARED:-/mnt/shared}
OUTPUT_DIR=${OUTPUT_DIR:-$SHARED/runs/$(basename "$CONFIG" .yaml)}

if [[ $OUTPUT_DIR == gs://* ]]; then
  echo "OUTPUT_DIR=$OUTPUT_DIR: name a folder under the mounted bucket, such as $SHARED/runs/x" >&2
  exit 1
fi

# Checkpoints and the cache of reference log-probs have to be the same files for every worker.
command=(train "$CONFIG" --output-dir "$OUTPUT_DIR" "$@")
quoted=$(printf ' %q' "${command[@]}")
gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all --command="
  set -e
  if [ -e ~/spo-jax.pid ] && kill -0 \"\$(cat ~/spo-jax.pid)\" 2>/dev/null; then
    echo \"a run is going on here already: stop it first (see tpu/README.md)\" >&2
    exit 1
  fi
  mountpoint -q '$SHARED' || { echo '$SHARED is not mounted: run tpu/create.sh again' >&2; exit 1; }
  cd ~/spo-jax
  HF_HOME=~/.cache/huggingface XDG_CACHE_HOME='$SHARED/cache' nohup ~/spo-venv/bin/spo-jax$quoted >~/spo-jax.log 2>&1 </dev/null &
  echo \$! >~/spo-jax.pid"
echo "started; watch it with:"
echo "  gcloud compute tpus tpu-vm ssh $NAME --project=$PROJECT --zone=$ZONE --worker=0 \\"
echo "    --command='tail -n 50 -f ~/spo-jax.log'"
