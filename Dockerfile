# Two variants of one binary: `docker build .` and `docker build --build-arg VARIANT=cuda .`
# The binary is the same; what differs is ONNX Runtime's library and, for CUDA, the image beneath it.
ARG VARIANT=cpu

FROM rust:1.95-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends pkg-config libssl-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# Dependencies first, so that a change of the sources does not build them again.
COPY Cargo.toml Cargo.lock rust-toolchain.toml ./
RUN mkdir -p src tests/it benches && echo 'fn main() {}' > src/main.rs && touch src/lib.rs tests/it/main.rs \
    && sed -i '/^\[\[bench\]\]/,$d' Cargo.toml && cargo build --release --locked && rm -rf src
COPY . .
RUN touch src/main.rs src/lib.rs && cargo build --release --locked && strip --strip-debug target/release/driftline

FROM python:3.11-slim-bookworm AS base-cpu
COPY pipelines/churn/requirements.txt /tmp/requirements.txt

FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 AS base-cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
COPY pipelines/churn/requirements.txt /tmp/cpu.txt
RUN sed 's/^onnxruntime==/onnxruntime-gpu==/' /tmp/cpu.txt > /tmp/requirements.txt

FROM base-${VARIANT}
RUN apt-get update && apt-get install -y --no-install-recommends libssl3 libgomp1 ca-certificates curl && rm -rf /var/lib/apt/lists/*
WORKDIR /app
RUN python3 -m venv .venv && .venv/bin/pip install --no-cache-dir -r /tmp/requirements.txt
COPY --from=build /src/target/release/driftline /usr/local/bin/driftline
COPY pipelines pipelines
COPY schemas schemas
RUN useradd --system --home-dir /app driftline && mkdir -p /data && chown driftline /data
USER driftline
ENV DRIFTLINE_PYTHON=/app/.venv/bin/python
EXPOSE 9464
ENTRYPOINT ["driftline"]
CMD ["run", "pipelines/churn", "--listen", "0.0.0.0:9464"]
