# AlgoPerf at its tested commit, with this project beside it, for NVIDIA GPUs from the V100 on.
#
#   docker build --tag kfac-algoperf .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" --env NPROC=4 \
#     --env WANDB_API_KEY --volume DATA:/data:ro --volume RUNS:/runs kfac-algoperf algoperf -- \
#     --workload=ogbg --data_dir=/data/ogbg --experiment_name=kfac
#
# ./run.sh docker run does this. Whatever a run writes lies in /runs, the mounted folder: its working
# directory, its home, and the default of every --experiment_dir and of the quickstart. Everything is
# installed when the image is built, nothing when a container starts; any user id will do.
#
# CUDA's libraries come with PyTorch's wheel: torch 2.5.1 from PyPI is built for CUDA 12.4 and holds
# kernels for the V100 (sm_70), which newer releases drop. The base image only has to let the
# driver of the host in. For the A100s of AlgoPerf's leaderboard of 2026:
#
#   docker build --build-arg TORCH_VERSION=2.9.0 --build-arg TORCHVISION_VERSION=0.24.0 \
#     --build-arg CUDA_ARCHITECTURE=sm_80 --tag kfac-algoperf-a100 .
ARG CUDA_IMAGE=nvidia/cuda:12.6.3-base-ubuntu24.04
# hadolint ignore=DL3006
FROM ${CUDA_IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# git: AlgoPerf records its commit. A compiler and Python's headers: torch.compile builds with them.
# Versions are the base image's: pinned ones vanish from Ubuntu's mirrors within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates gcc g++ git libgomp1 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

ARG ALGOPERF_REPOSITORY=https://github.com/mlcommons/algorithmic-efficiency.git
ARG ALGOPERF_COMMIT=2c90454fc05d5bdf3598b0c7651e611f132a7060
ARG ALGOPERF_EXTRAS=jax_cpu,pytorch_gpu,full
# AlgoPerf's pins at that commit, and what has to be among the wheel's kernels.
ARG TORCH_VERSION=2.5.1
ARG TORCHVISION_VERSION=0.20.1
ARG CUDA_ARCHITECTURE=sm_70
COPY requirements /tmp/requirements
# The commit has no tag nearby to tell a version by, hence the pretended one.
RUN git init --quiet /tmp/algoperf \
    && git -C /tmp/algoperf fetch --quiet --depth 1 "$ALGOPERF_REPOSITORY" "$ALGOPERF_COMMIT" \
    && git -C /tmp/algoperf checkout --quiet FETCH_HEAD \
    && python3 -m venv /opt/venv \
    && SETUPTOOLS_SCM_PRETEND_VERSION=0.6.0 pip install --no-cache-dir \
        "/tmp/algoperf[${ALGOPERF_EXTRAS}]" -r /tmp/requirements/algoperf.txt \
        -r /tmp/requirements/image.txt \
    && pip install --no-cache-dir "torch==${TORCH_VERSION}" "torchvision==${TORCHVISION_VERSION}" \
    && pip install --no-cache-dir --no-deps -r /tmp/requirements/no-deps.txt \
    && echo "$ALGOPERF_COMMIT" >/opt/venv/.stamp-algoperf \
    && rm -rf /tmp/algoperf /tmp/requirements \
    && python -c "import torch; flags = torch._C._cuda_getArchFlags(); assert '${CUDA_ARCHITECTURE}' in flags, flags"

COPY . /opt/project
# The quickstart's molecules, so that a container needs no network.
RUN PYTHONPATH=/opt/project python -m quickstart.molecules --data_dir=/opt/project/data \
    && chmod -R a+rX /opt/project /opt/venv \
    && mkdir -m 1777 /runs \
    && mkdir /data

# Without a volume at /runs the container's own folder stands in for it, and goes with the container.
VOLUME /runs
WORKDIR /runs
ENV HOME=/runs \
    KFAC_NO_SETUP=1 \
    KFAC_RUNS_DIR=/runs \
    VENV_DIR=/opt/venv \
    ALGOPERF_VENV_DIR=/opt/venv \
    PYTHONDONTWRITEBYTECODE=1
USER 1000

# Keys (WANDB_API_KEY) are passed when a container starts and are in no layer.
ENTRYPOINT ["/opt/project/run.sh"]
CMD ["--help"]
