# syntax=docker/dockerfile:1
# The trainer's image with NVIDIA's apex, for optim.backend apex; docs/containers.md says how it is built.
#
# An image on top of the other one, which stays as small and as quick to build as it is: apex has no wheels, and its
# kernels need a whole CUDA toolkit to compile, of the very version that torch was built with.  Both stages before the
# last are left behind.
ARG TRAINER=dcgan-faces:0.1.0
ARG CUDA=nvidia/cuda:13.2.0-devel-ubuntu24.04

FROM ${CUDA} AS cuda

FROM ${TRAINER} AS build
# hadolint ignore=DL3002
USER 0:0
COPY --from=cuda /usr/local/cuda /usr/local/cuda
# The build context of this name: a clone of apex, or its address and commit.
# hadolint ignore=DL3022
COPY --from=apex . /opt/apex
WORKDIR /opt/apex
ARG ARCHITECTURES="8.0;9.0;10.0"
ARG JOBS=4
ENV CUDA_HOME=/usr/local/cuda \
    TORCH_CUDA_ARCH_LIST=${ARCHITECTURES} \
    MAX_JOBS=${JOBS} \
    APEX_CPP_EXT=1 \
    APEX_CUDA_EXT=1
RUN /opt/venv/bin/python -m pip wheel --no-cache-dir --disable-pip-version-check \
    --no-deps --no-build-isolation --no-index --wheel-dir /opt/wheels .

FROM ${TRAINER}
USER 0:0
RUN --mount=type=bind,from=build,source=/opt/wheels,target=/opt/wheels \
    /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps --no-index /opt/wheels/*.whl
USER 10001:10001
