# docker build -t prunus . && docker run --rm prunus
# Runs the demo: a small model is pruned, compressed and scored. Any other command works as well:
# docker run --rm -v "$PWD:/work" -w /work prunus prunus prune MODEL OUT
# The address of torch's packages without CUDA, as --build-arg PIP_EXTRA_INDEX_URL=…, makes the
# image gigabytes smaller.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home prunus
USER prunus
WORKDIR /home/prunus/prunus
COPY --chown=prunus . .
ENV VENV=/home/prunus/venv PATH=/home/prunus/venv/bin:$PATH
ARG PIP_EXTRA_INDEX_URL=
# The bytecode belongs into the image: a container that is removed would compile it each time.
RUN make install PYTHON=python VENV="$VENV" && (python -m compileall -q "$VENV" || true)
CMD ["make", "demo", "VENV=/home/prunus/venv"]
