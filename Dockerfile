# Two images, which differ in the build of torch alone:
#   docker build --target cpu --tag rotmole:cpu .
#   docker build --target gpu --tag rotmole:gpu .      (run it with --gpus all)
#   docker run --rm -v "$PWD":/work -v rotmole-models:/models rotmole:cpu train run.yaml
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS base
ENV HF_HOME=/models/huggingface \
    ROTMOLE_CACHE=/models/rotmole \
    PYTHONDONTWRITEBYTECODE=1
RUN useradd --create-home --uid 1000 rotmole \
    && mkdir --mode 1777 /models /work  # writable with --user "$(id -u):$(id -g)", too
COPY constraints.txt /constraints.txt
COPY --from=wheel /wheels /wheels
WORKDIR /work
ENTRYPOINT ["rotmole"]
CMD ["--help"]

# torch's own index has builds without CUDA, which are newer to pip than those of the same version
FROM base AS cpu
RUN pip install --no-cache-dir --constraint /constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu torch \
    && pip install --no-cache-dir --constraint /constraints.txt "rotmole[demo,serve] @ file://$(ls /wheels/*.whl)"
USER 1000:1000
VOLUME ["/models"]

# the package index's torch brings its CUDA libraries; the driver is the host's
FROM base AS gpu
RUN pip install --no-cache-dir --constraint /constraints.txt "rotmole[demo,quant,serve] @ file://$(ls /wheels/*.whl)"
USER 1000:1000
VOLUME ["/models"]
