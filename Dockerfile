# qexp with the CPU build of torch:
#   docker build -t qexp .
#   docker run --rm -v "$PWD/outputs:/experiments/outputs" -v qexp-cache:/cache qexp method=gptq weight.bits=3
FROM python:3.11-slim

# the index that has the CPU build of torch; a mirror has its own
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY qexp qexp
COPY conf conf
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c constraints.txt ".[eval]"

ENV QEXP_CACHE_DIR=/cache HF_HOME=/cache/huggingface
WORKDIR /experiments
ENTRYPOINT ["qexp"]
CMD ["--help"]
