# docker build -t dist_egnn . && docker run --rm --shm-size=2g -v "$PWD":/data dist_egnn train my.yaml
FROM python:3.11-slim
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install --no-cache-dir "/src[viz,import]" && rm -rf /src
WORKDIR /data
ENTRYPOINT ["distegnn"]
