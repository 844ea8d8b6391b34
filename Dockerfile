# CPU:   docker build -t moe2dense .
# CUDA:  docker build -t moe2dense --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Run:   docker run --rm -v "$PWD:/data" moe2dense convert /opt/moe2dense/examples/tiny-mixtral \
#            --to 3.2m --tokens 20k --out /data/out
# With a GPU add --gpus all. Hub downloads are kept with -v moe2dense-cache:/home/moe2dense/.cache
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# extras of pyproject.toml
ARG EXTRAS=gguf,quantize

# torch first and from its own index: a range alone may bring gigabytes of CUDA
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "${TORCH}"

COPY . /opt/moe2dense
RUN pip install --no-cache-dir "/opt/moe2dense[${EXTRAS}]"

RUN useradd --create-home --uid 1000 moe2dense && mkdir -p /data && chown moe2dense /data
USER moe2dense
WORKDIR /data
ENTRYPOINT ["moe2dense"]
CMD ["--help"]
