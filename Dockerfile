# A server of `l2rec serve`, on processors.
#   docker build -t l2rec .
#   docker run --user "$(id -u):$(id -g)" -p 127.0.0.1:8000:8000 --env-file keys.env \
#     -v "$PWD/serving:/serving" -v "$PWD/runs:$PWD/runs:ro" l2rec
# The user is the owner of the folder that is served, which the server writes into.
# Paths in live.json are those of `l2rec deploy`: mount runs where they lie, or deploy in here.
# Keys come from the environment of the container (keys.env: L2REC_READ_KEYS, L2REC_WRITE_KEYS);
# nothing in the image is a secret. It listens on all addresses of the container and so does not
# start without a key.

FROM python:3.11-slim AS build

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
# PyTorch first, and its CPU build: without this, pip brings gigabytes of CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" \
      "torch==$(sed -n 's/^torch==//p' constraints.txt)+cpu" \
 && /venv/bin/pip install --no-cache-dir -c constraints.txt '.[minilm,serve,postgres,faiss]'

FROM python:3.11-slim

RUN useradd --system --uid 10001 --create-home l2rec && install -d -o l2rec /serving
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
USER l2rec
WORKDIR /serving
VOLUME /serving
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=8s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=7)"]
# SIGTERM ends it: what is in flight is answered first. Give it more than --shutdown seconds.
STOPSIGNAL SIGTERM
ENTRYPOINT ["l2rec", "serve"]
CMD ["/serving", "--host", "0.0.0.0", "--port", "8000"]
