#!/usr/bin/env bash
# Environment of a run on TPU workers: sourced by worker.sh and by the container of gke/.
# Each line with its reason and where that is from. What they gain is not measured here.
SHARED=${SHARED:-/mnt/shared}

# A TPU that cannot be had (another process holds it, say) is an error. Left unset, JAX goes on with
# the CPU after a warning. The cpu backend behind it is for small arrays on the host.
# JAX documentation, "Configuration options": platforms named here must all initialize.
export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}

# Compiled programs, kept over restarts: after a pre-emption the step is not compiled again. On the
# shared folder or in the store, as every worker compiles the same program and a new slice has empty
# disks. JAX documentation, "Persistent compilation cache": a network file system or gs:// for several.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${STORE:-$SHARED}/cache/jax}

# spo_jax keeps reference log-probs in the user's cache unless reference.cache_dir says otherwise. On
# what is mounted they survive the slice; without a mount a new slice computes them again.
[[ -n ${STORE:-} ]] || export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$SHARED/cache}

# What the hub client downloads: on each worker's own disk. On a network file system its many small
# files and file locks are slow. Hugging Face Hub documentation, "Environment variables".
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}

# Lines reach the log when they are printed. Python documentation, "Command line and environment".
export PYTHONUNBUFFERED=1

# LIBTPU_INIT_ARGS is left alone, on purpose. The flags that are often handed round for sharded
# parameters (xla_tpu_enable_async_collective_fusion and its ..._fuse_all_gather and ..._multiple_steps,
# xla_tpu_overlap_compute_collective_tc, xla_enable_async_all_gather) are defaults on v5e: a scanned
# and sharded stack of layers compiles to the same program with and without them. On v6e and v5p
# the compiler refuses that stack with them ("Continuation fusion for AllGather ... not supported").
# Both tried with libtpu 0.0.51, compiling ahead of time for v5e:4x4, v6e:4x4 and v5p:2x2x4.
