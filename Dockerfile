# A version of the official slim image, and its digest (sha256:…): a tag is what its owner says today. `.ci/image` builds
# without a registry, on a stand-in for that image, and with the digest of that.
ARG PYTHON=3.12
ARG DIGEST=

FROM python:${PYTHON}-slim${DIGEST:+@${DIGEST}} AS build
WORKDIR /build
RUN python -m venv --without-pip /opt/tricorn
COPY .ci/build-requirements.txt .ci/requirements.txt ./
RUN pip install --no-cache-dir --require-hashes --only-binary :all: -r build-requirements.txt \
    && pip --python /opt/tricorn/bin/python install --no-cache-dir --require-hashes --only-binary :all: -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY server server
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir . . \
    && pip --python /opt/tricorn/bin/python install --no-cache-dir --no-index --no-deps tricorn-*.whl \
    && pip --python /opt/tricorn/bin/python check

FROM python:${PYTHON}-slim${DIGEST:+@${DIGEST}}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Tricorn" \
    org.opencontainers.image.description="A chat with agents over WebSockets, on a server in which every connection is a nursery" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/tricorn /opt/tricorn
ENV PATH=/opt/tricorn/bin:$PATH TRICORN_HOST=0.0.0.0 PORT=8080 TRICORN_LOG=memory:
WORKDIR /app
# /data is for a volume with a log in a file. The drill loads all that serving needs: it shows that the image can, and
# leaves the bytecode that nobody can write later.
RUN install --directory --owner=10001 --group=10001 /data && tricorn drill
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=3s --start-period=10s CMD ["python", "-c", \
    "from os import environ as e; from urllib.request import urlopen; urlopen(f'http://127.0.0.1:{e[\"PORT\"]}/healthz', timeout=2)"]
CMD ["tricorn", "serve"]
