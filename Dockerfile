# No image has been built where this was written: its steps were run by hand, on Python 3.12, and the server as process 1.
#   docker build -t flover .                              for a CPU
#   docker build -t flover --build-arg TORCH_INDEX= .     for NVIDIA GPUs; docker run --gpus all ...
#   docker run -p 8000:8000 --stop-timeout 40 -e FLOVER_API_KEY=... flover serve [MODEL] --host 0.0.0.0
# The stop timeout is above --drain-timeout (30 s); Docker's own, 10 s, would cut a drain short.
FROM python:3.12-slim

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Triton compiles its launchers with a C compiler, on a GPU
RUN if [ -z "$TORCH_INDEX" ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
WORKDIR /src
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url $TORCH_INDEX} "$TORCH"
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir ".[server,otel]" "$TORCH" && useradd --create-home flover

USER flover
WORKDIR /home/flover
EXPOSE 8000
# the supervisor is process 1: it takes SIGTERM, drains, and collects the front and what a killed front leaves
ENTRYPOINT ["flover"]
CMD ["serve", "--host", "0.0.0.0"]
