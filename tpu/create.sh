#!/usr/bin/env bash
# Queue a TPU slice, wait for it, and set it up: shared folder, Python, spo_jax on every worker.
# May be run again: what is there already is left alone.
#
#   PROJECT=... ZONE=... NAME=... BUCKET=... tpu/create.sh
set -euo pipefail

: "${PROJECT:?set PROJECT to the Google Cloud project}"
: "${ZONE:?set ZONE to a zone that has the accelerator, such as us-west4-a}"
: "${NAME:?set NAME, the name of the slice and of its queued resource}"
if [[ -z ${BUCKET:-} && -z ${NFS:-} ]]; then
  echo "set BUCKET (a Cloud Storage bucket, no gs://) or NFS (SERVER:/SHARE) for runs and data" >&2
  exit 1
fi
ACCELERATOR=${ACCELERATOR:-v5litepod-8}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SHARED=${SHARED:-/mnt/shared}
PYTHON=${PYTHON:-3.12}
SPOT=${SPOT:-}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
where=(--project="$PROJECT" --zone="$ZONE")

on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || true
}

if [[ -z $(state) ]]; then
  echo "queueing $ACCELERATOR as $NAME"
  gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
    --scopes=https://www.googleapis.com/auth/cloud-platform ${SPOT:+--spot}
fi
until [[ $(state) == ACTIVE ]]; do
  case $(state) in
    FAILED | SUSPENDING | SUSPENDED)
      echo "$NAME is $(state): delete it (see tpu/README.md), then run this again" >&2
      exit 1
      ;;
  esac
  echo "waiting: $(state)"
  sleep 30
done

if [[ -n ${NFS:-} ]]; then
  echo "mounting $NFS at $SHARED"
  on_all_workers "set -e
    sudo mkdir -p '$SHARED'
    command -v mount.nfs >/dev/null || { sudo apt-get -q update; sudo apt-get -qy install nfs-common; }
    mountpoint -q '$SHARED' || sudo mount -t nfs '$NFS' '$SHARED'"
else
  echo "mounting bucket $BUCKET at $SHARED"
  # Checkpoints are finished by renaming a folder; gcsfuse does that only up to a number of files.
  on_all_workers "set -e
    if ! command -v gcsfuse >/dev/null; then
      key=/usr/share/keyrings/cloud.google.asc
      curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee \$key >/dev/null
      echo \"deb [signed-by=\$key] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      sudo apt-get -q update
      sudo apt-get -qy install gcsfuse
    fi
    sudo mkdir -p '$SHARED'
    sudo chown \"\$(id -u):\$(id -g)\" '$SHARED' 2>/dev/null || true
    mountpoint -q '$SHARED' || gcsfuse --implicit-dirs --rename-dir-limit=200000 '$BUCKET' '$SHARED'"
fi

echo "installing spo_jax (the committed state) on every worker"
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$NAME:spo-jax.tar.gz" "${where[@]}" --worker=all
# A Python of our own: the image's may be older than 3.11.
on_all_workers "set -e
  mkdir -p ~/spo-jax
  tar -xzf ~/spo-jax.tar.gz -C ~/spo-jax
  command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [ -d ~/spo-venv ] || ~/.local/bin/uv venv --seed --python '$PYTHON' ~/spo-venv
  cd ~/spo-jax
  ~/spo-venv/bin/pip install --quiet -e '.[tpu]'
  ~/spo-venv/bin/spo-jax --help >/dev/null"
echo "$NAME is ready: tpu/launch.sh CONFIG"
