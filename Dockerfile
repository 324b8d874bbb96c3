# UNTESTED: written where no image can be built. It installs the CPU build of PyTorch; for a GPU leave TORCH_INDEX empty.
#   docker build -t flover .
#   docker run -p 8000:8000 -e FLOVER_API_KEY=... flover serve --host 0.0.0.0
FROM python:3.12-slim

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /src
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url $TORCH_INDEX} "$TORCH"
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir ".[server,otel]" "$TORCH" && useradd --create-home flover

USER flover
WORKDIR /home/flover
EXPOSE 8000
# the supervisor is process 1: it takes SIGTERM, drains, and collects the front
ENTRYPOINT ["flover"]
CMD ["serve", "--host", "0.0.0.0"]
