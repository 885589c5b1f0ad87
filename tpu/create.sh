#!/usr/bin/env bash
# Queue a TPU slice, wait for it, and set it up: Python and spo_jax on every worker, and the folder
# that they share, where one is mounted.
# May be run again: what is there already is left alone, and the committed state is installed anew.
#
#   PROJECT=... ZONE=... NAME=... STORE=gs://... tpu/create.sh      (or BUCKET=..., NFS=...)
#
# Everything comes from the environment; README.md beside this file has the table.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# -eq 0 ]] || die "takes no arguments, got $*: everything comes from the environment"
slice_arguments
if [[ -z ${STORE:-} && -z ${BUCKET:-} && -z ${NFS:-} ]]; then
  die "set STORE (gs://BUCKET/PATH, nothing is mounted), or NFS (SERVER:/SHARE) or BUCKET (its name) \
to be mounted, for runs and data"
fi
[[ -z ${BUCKET:-} || -z ${NFS:-} ]] || die "BUCKET and NFS are both set: which is to be mounted?"
[[ -z ${STORE:-} || -z ${BUCKET:-}${NFS:-} ]] ||
  die "STORE is set, and BUCKET or NFS too: runs lie in the store, or on what is mounted"
[[ ${BUCKET:-} != gs://* ]] || die "BUCKET=$BUCKET: give the name alone, without gs://"
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
PYTHON=${PYTHON:-3.12}
INTERVAL=${INTERVAL:-30}
WAIT_MINUTES=${WAIT_MINUTES:-1440}
whole INTERVAL
whole WAIT_MINUTES
case ${SPOT:-0} in
  0 | 1) ;;
  *) die "SPOT=$SPOT: expected 1 (a spot slice) or 0" ;;
esac

queue() {
  local options=()
  [[ ${SPOT:-0} == 0 ]] || options+=(--spot)
  [[ -z ${VALID_FOR:-} ]] || options+=(--valid-until-duration="$VALID_FOR")
  [[ -z ${NETWORK:-} ]] || options+=(--network="$NETWORK")
  say "queueing $ACCELERATOR as $NAME: it costs money from the moment it is ACTIVE"
  run gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
    --scopes=https://www.googleapis.com/auth/cloud-platform "${options[@]}"
}

wait_until_active() {
  if dry; then
    wait_line ACTIVE
    return
  fi
  local state deadline=$((SECONDS + 60 * WAIT_MINUTES))
  while true; do
    state=$(slice_state)
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        die "$NAME is $state: tpu/status.sh says why; tpu/delete.sh, then run this again" 1
        ;;
    esac
    ((SECONDS < deadline)) || die "$NAME is still ${state:-not there} after $WAIT_MINUTES minutes. \
It stays queued: run this again to go on waiting, or tpu/delete.sh" 1
    say "waiting: ${state:-not there yet}"
    sleep "$INTERVAL"
  done
}

mount_nfs() {
  say "mounting $NFS at $SHARED"
  on_workers all "set -e
sudo mkdir -p '$SHARED'
command -v mount.nfs >/dev/null || { sudo apt-get -q update; sudo apt-get -qy install nfs-common; }
mountpoint -q '$SHARED' || sudo mount -t nfs -o hard,vers=3 '$NFS' '$SHARED'
[ -w '$SHARED' ] || sudo chmod 1777 '$SHARED'"
}

mount_bucket() {
  say "mounting bucket $BUCKET at $SHARED"
  # Checkpoints are finished by renaming a folder; gcsfuse does that only up to a number of files.
  on_workers all "set -e
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
}

install() {
  local archive=${TMPDIR:-/tmp}/spo-jax-$NAME.tar.gz changed
  say "installing spo_jax (the committed state) on every worker"
  changed=$(git status --porcelain | wc -l)
  ((changed == 0)) || say "$changed changed files are not committed, so not copied"
  # A new version under a run that goes on would break what it has not imported yet.
  on_workers all "[ ! -e spo-jax/tpu/worker.sh ] || $WORKER_SH idle"
  run git archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:spo-jax.tar.gz" "${WHERE[@]}" --worker=all
  run rm -f "$archive"
  # A Python of our own: the image's may be older than 3.11.
  on_workers all "set -e
rm -rf ~/spo-jax
mkdir ~/spo-jax
tar -xzf ~/spo-jax.tar.gz -C ~/spo-jax
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d ~/spo-venv ] || ~/.local/bin/uv venv --seed --python '$PYTHON' ~/spo-venv
cd ~/spo-jax
~/spo-venv/bin/pip install --quiet -e '.[tpu,buckets]'
~/spo-venv/bin/spo-jax train --help >/dev/null"
}

cd "$TPU/.." || exit
if dry; then state=; else state=$(slice_state); fi
[[ -n $state ]] || queue
wait_until_active
if [[ -n ${NFS:-} ]]; then mount_nfs; elif [[ -n ${BUCKET:-} ]]; then mount_bucket; fi
install
say "$NAME is ready: tpu/launch.sh CONFIG"
