# trl_ema with all that training, measuring and reporting need; on a GPU through the driver of the host.
#
#     docker build -t trl_ema .
#     docker run --gpus all -v ~/.cache:/root/.cache -v "$PWD:/work" trl_ema train --config my_run.yaml
#
# The wheels of torch bring CUDA's libraries along: no CUDA image is needed. What the shipped launches let DeepSpeed compile, the
# optimizer of zero3_offload, takes g++ alone in the version of constraints.txt; earlier ones ask for nvcc, and so for an image
# nvidia/cuda:...-devel of torch's CUDA with Python in it. Not built in this project's tests.
FROM python:3.12-slim

# DeepSpeed compiles some of its parts at their first use, Triton its kernels.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ git ninja-build && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/trl_ema
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[demo,eval,report,export,deepspeed]'

WORKDIR /work
ENTRYPOINT ["trl-ema"]
CMD ["--help"]
