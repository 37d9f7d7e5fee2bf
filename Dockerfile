# The package with its tested versions, for GPUs: wheels of torch bring CUDA, the host brings the driver.
#
#   docker build --tag torchtitan-vlm .
#   docker run --rm --gpus all --ipc host --volume "$PWD/outputs:/work/outputs" torchtitan-vlm train --job.config_file vlm_debug
#
# --ipc host: batches of the loader's processes lie in shared memory, of which a container has 64 MB otherwise.
FROM python:3.11-slim-bookworm

# torch.compile builds kernels with it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/torchtitan-vlm
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY torchtitan torchtitan
COPY experiments experiments
COPY train_configs train_configs
COPY assets assets
RUN pip install --no-cache-dir --constraint constraints.txt '.[s3,gcs,hf]'

WORKDIR /work
ENTRYPOINT ["torchtitan-vlm"]
CMD ["--help"]
