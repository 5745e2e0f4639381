# syntax=docker/dockerfile:1
# The trainer in exactly the environment of requirements.lock; docs/containers.md says how it is built and run:
#   docker build --tag dcgan-faces:0.1.0 .
#
# A plain Debian and no CUDA image: torch's and DALI's wheels bring every CUDA library that they load, and the driver
# comes from the host, so a CUDA base would add gigabytes that nobody opens.  Debian's own Python (3.13) rather than
# the python image's: its security updates come with the system's, and `make test-system` can run every step below in a
# Debian root without a container engine.
#
# For an image that can be built again, pin the base by digest:
#   docker buildx imagetools inspect debian:trixie-slim       prints it
#   docker build --build-arg BASE=debian:trixie-slim@sha256:... .
ARG BASE=debian:trixie-slim
FROM ${BASE}

# A C compiler and Python's headers: Triton and torch.compile build with them while they run.
# Debian drops superseded versions from its archive, so a build that pins them fails within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc libc6-dev make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Four places are written to; all else may be read-only.  Sticky and open, so that --user can be anyone.
RUN useradd --uid 10001 --no-log-init --no-create-home --home-dir /home/trainer --shell /usr/sbin/nologin trainer \
    && install --directory --mode=1777 /home/trainer /cache /data /runs \
    && python3 -m venv /opt/venv

# HOME and USER hold for a --user without an entry in passwd too: torch asks for both.
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/home/trainer \
    USER=trainer \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor

WORKDIR /opt/dcgan-faces

# The large layer, made anew only when the lock changes.  Downloads stay with the builder, none in the image.
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/python -m pip install --cache-dir /root/.cache/pip --disable-pip-version-check \
    --require-hashes --requirement requirements.lock

# The small one.  `make VENV= train` writes below data and runs of the clone: here those are the volumes.
COPY . .
RUN /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
    --no-deps --no-build-isolation --no-index --editable . \
    && /opt/venv/bin/python -m pip check \
    && /opt/venv/bin/python -m compileall -q pipeline kernels launch benchmarks \
    && ln --symbolic /data data \
    && ln --symbolic /runs runs

ARG COMMIT=unknown
LABEL org.opencontainers.image.title="dcgan-faces" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision="${COMMIT}"

VOLUME ["/home/trainer", "/cache", "/data", "/runs"]
USER 10001:10001
CMD ["make", "VENV=", "help"]
