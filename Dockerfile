# docker build -t mergekit_lite .                          torch for the CPU
# docker build -t mergekit_lite --build-arg TORCH=cu130 .  for CUDA 13.0; https://download.pytorch.org/whl/ has others
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" -v merge-cache:/cache mergekit_lite run recipe.yaml
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build
ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/merge
# torch by itself: a change of the program does not fetch it again.
COPY constraints.txt ./
RUN /opt/merge/bin/python -m pip install --extra-index-url "https://download.pytorch.org/whl/${TORCH}" \
    -c constraints.txt "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY recipes/methods recipes/methods
COPY mergekit_lite mergekit_lite
RUN /opt/merge/bin/python -m pip install -c constraints.txt .

FROM python:${PYTHON}-slim
# The Hub's cache and the digests that are kept between runs lie in the volume, for whichever user runs this.
ENV PATH=/opt/merge/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
RUN useradd --create-home --uid 1000 merge && mkdir -m 1777 /cache /work
COPY --from=build /opt/merge /opt/merge
USER 1000:1000
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["merge"]
CMD ["--help"]
