# The image: one binary on glibc, no shell, not root, /data its own. Built with
#   docker build -t inlet .
# or, where a registry cannot be reached, with other bases of the same kind by --build-arg BUILD_IMAGE, RUNTIME_IMAGE.
ARG BUILD_IMAGE=docker.io/library/rust:1.95-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILD_IMAGE} AS build
# aws-lc (TLS) and jemalloc are C: the image has cc and make, cmake is for machines aws-lc has no ready build list for.
RUN command -v cmake >/dev/null \
 || (apt-get update && apt-get install -y --no-install-recommends cmake && rm -rf /var/lib/apt/lists/*)
WORKDIR /build

# The dependencies first, as a layer that only a changed manifest or lock file invalidates. Targets that name their
# files are taken out of the manifest here, since the files are not there yet.
COPY Cargo.toml Cargo.lock ./
RUN cp Cargo.toml Cargo.toml.whole \
 && awk '/^\[/ { skip = /^\[\[(bench|test|bin|example)\]\]/ } !skip' Cargo.toml.whole > Cargo.toml \
 && mkdir src && touch src/lib.rs && echo 'fn main() {}' > src/main.rs \
 && cargo build --release --locked \
 && rm -rf src

COPY . .
# Cargo goes by modification times, and COPY keeps those of the checkout, which may be older than the stand-ins.
RUN find src -name '*.rs' -exec touch {} + \
 && cargo build --release --locked --bin inlet \
 && install -D target/release/inlet /image/usr/local/bin/inlet \
 && mkdir /image/data

FROM ${RUNTIME_IMAGE}
COPY --from=build /image/usr/local/bin/inlet /usr/local/bin/inlet
COPY --from=build --chown=65532:65532 /image/data /data
ENV DATA_DIR=/data PORT=8080
USER 65532:65532
WORKDIR /data
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 CMD ["/usr/local/bin/inlet", "probe"]
ENTRYPOINT ["/usr/local/bin/inlet"]
CMD ["serve"]
