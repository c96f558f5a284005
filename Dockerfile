# fedss on the CPU, with Flower: the server and the sites of compose.yaml, or any other command.
FROM python:3.11-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY fedss fedss
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
# Where pip finds the CPU build of torch. Without it, pip's own index: on x86-64 that has the build
# with CUDA, which is several times as large.
ARG TORCH_INDEX_URL=""
ENV FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 PYTHONUNBUFFERED=1
COPY constraints.txt /wheels/
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
    "$(grep '^torch==' /wheels/constraints.txt)"
COPY --from=wheel /wheels/*.whl /wheels/
RUN pip install --no-cache-dir -c /wheels/constraints.txt "$(ls /wheels/*.whl)[flower]"
RUN useradd --uid 1000 --create-home fedss
USER fedss
WORKDIR /home/fedss
CMD ["fedss", "--help"]
