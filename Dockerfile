# spo-jax for the CPU; for NVIDIA GPUs with --build-arg EXTRA=cuda (the CUDA libraries come with
# jax's wheels, the host needs the driver and the NVIDIA container toolkit), for TPUs EXTRA=tpu.
#
#   docker build -t spo-jax .
#   docker run --rm -v "$PWD/runs:/work/runs" spo-jax train quickstart
#   docker build --build-arg EXTRA=cuda -t spo-jax:cuda .
#   docker run --rm --gpus all -v "$PWD:/work" spo-jax:cuda train CONFIG.yaml
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG EXTRA=
WORKDIR /src
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY configs configs
COPY spo_jax spo_jax
# The versions that were tested with this one.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --constraint requirements.txt ".${EXTRA:+[$EXTRA]}" \
    && useradd --create-home --uid 1000 spo \
    && mkdir /work \
    && chown spo /work

USER 1000
WORKDIR /work
ENTRYPOINT ["spo-jax"]
CMD ["--help"]
