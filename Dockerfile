# A static binary in an otherwise empty image: no shell, no package manager, nothing to patch but Serin itself.
#
#   docker build -t serin .
#   docker run --rm -p 8080:8080 -v "$PWD/etc:/etc/serin:ro" serin        with your configuration in etc/serin.yaml
#
# Mount the directory, not the file: a single mounted file stays the old one when an editor or a ConfigMap replaces it.

# The version of rust-toolchain.toml. That file itself stays outside, since it would fetch lint tools nobody needs here.
ARG RUST_VERSION=1.95.0

FROM rust:${RUST_VERSION}-slim-bookworm AS build
# A C compiler for the cryptography and the allocator; the certificates are copied into the final image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build

# With crt-static the C library is linked into the binary. A target must be named, even though it is the machine's own:
# otherwise the flag holds for build scripts and procedural macros as well, and the latter cannot be linked statically.
# Relocations are packed, which saves half a megabyte.
ENV RUSTFLAGS="-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs"

# The dependencies alone, in a layer that stays valid until Cargo.toml or Cargo.lock changes. Tests, benchmarks and
# examples are taken out of the manifest, since cargo would look for their files.
COPY Cargo.toml Cargo.lock ./
COPY .cargo .cargo
RUN cp Cargo.toml Cargo.toml.whole \
    && awk '/^\[\[(bench|example|test)\]\]/ { skip = 1; next } /^\[/ { skip = 0 } !skip' Cargo.toml.whole > Cargo.toml \
    && mkdir src \
    && echo '//! Stands in for the sources; without this line a lint fails.' > src/lib.rs \
    && cp src/lib.rs src/main.rs \
    && echo 'fn main() {}' >> src/main.rs \
    && cargo build --release --locked --target "$(rustc --print host-tuple)"

COPY src src
# The stand-ins are newer than the sources, so cargo would take them for what it built last.
RUN touch src/main.rs src/lib.rs \
    && cargo build --release --locked --target "$(rustc --print host-tuple)" \
    && cp "target/$(rustc --print host-tuple)/release/serin" /serin

FROM scratch
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="serin" \
      org.opencontainers.image.description="A traffic proxy for canary and gray releases" \
      org.opencontainers.image.licenses="Apache-2.0 OR MIT" \
      org.opencontainers.image.source="https://github.com/serin-proxy/serin" \
      org.opencontainers.image.documentation="https://github.com/serin-proxy/serin/blob/main/docs/README.md" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /serin /serin
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
# Traffic, and the admin listener. The latter is on the loopback interface unless admin.address says otherwise.
EXPOSE 8080 9901
# Where the admin listener is elsewhere, or takes TLS, say so in SERIN_HEALTHCHECK_URL. Kubernetes has its own probes.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD ["/serin", "healthcheck"]
ENTRYPOINT ["/serin"]
CMD ["run", "--config", "/etc/serin/serin.yaml"]
