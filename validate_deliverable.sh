#!/usr/bin/env bash
# Checks the whole of Inlet: formatting, lints, documentation, tests, and a smoke run of the built binary.
# The one command for it, on a fresh Debian machine, a developer's, and in CI (.ci/run calls this and nothing else).
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./validate_deliverable.sh [--dry-run-deploy] [--help]

Run from the repository root. Checks formatting, lints, documentation, tests, and the built binary.
Installs what Debian can provide where it may (as root, or by sudo without a password), else says what is missing.

  --dry-run-deploy  print the Cloud Run service that cloudbuild.yaml would deploy, and touch nothing. Substitutions
                    come from the environment (PROJECT_ID, BUILD_ID, _REGION, _TWITCH_CHANNELS, ...), else from the
                    defaults in cloudbuild.yaml
  --help            this text

Exit: 0 all is well, 1 a step failed, 2 not in the repository root, 3 something is missing, 64 usage
HELP
}

main() {
  local mode=validate
  case "$#:${1-}" in
    0:) ;;
    1:--dry-run-deploy) mode=dry_run_deploy ;;
    1:--help | 1:-h)
      usage
      exit 0
      ;;
    *)
      usage >&2
      exit 64
      ;;
  esac
  require_root_folder
  "$mode"
}

require_root_folder() {
  local home
  home=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
  if [[ $(pwd -P) != "$home" || ! -f Cargo.toml ]]; then
    printf 'validate_deliverable.sh: run it from the repository root: cd %s && ./validate_deliverable.sh\n' "$home" >&2
    exit 2
  fi
}

dry_run_deploy() {
  local project=${PROJECT_ID:-${GOOGLE_CLOUD_PROJECT:-my-project}} build=${BUILD_ID:-dry-run}
  {
    printf 'The service that cloudbuild.yaml would deploy; nothing is built, pushed or deployed.\n'
    printf 'PROJECT_ID=%s, BUILD_ID=%s (Cloud Build gives both). It would run:\n' "$project" "$build"
    printf '  gcloud run services replace SERVICE.yaml --project PROJECT_ID --region _REGION --quiet\n\n'
  } >&2
  PROJECT_ID=$project BUILD_ID=$build scripts/render-service
}

validate() {
  trap summary EXIT
  # Debian keeps servers in sbin, which a user's PATH may lack; rustup installs into the home folder.
  PATH=$PATH:/usr/local/sbin:/usr/sbin:${CARGO_HOME:-$HOME/.cargo}/bin
  step 'tools' tools
  step 'format' cargo fmt --check
  step 'lints' cargo clippy --all-targets --locked -- -D warnings
  step 'documentation' documentation
  step 'tests' tests
  step 'smoke run' smoke
}

# --- the steps ---------------------------------------------------------------------------------------------------

documentation() {
  RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --locked
}

tests() {
  if cargo nextest --version >/dev/null 2>&1; then
    scripts/with-firestore-emulator cargo nextest run --locked
  else
    printf 'cargo-nextest is not installed: the same tests by cargo test\n'
    scripts/with-firestore-emulator cargo test --locked --lib --bins --tests
  fi
  cargo test --locked --doc
}

# With the binary that the tests were run with.
smoke() {
  scripts/smoke "${CARGO_TARGET_DIR:-target}/debug/inlet"
}

# --- what a fresh Debian lacks -----------------------------------------------------------------------------------

tools() {
  local packages=() component
  command -v cc >/dev/null || packages+=(gcc libc6-dev)
  command -v make >/dev/null || packages+=(make)
  command -v python3 >/dev/null || packages+=(python3)
  # The examples are run as their readers would run them.
  python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
  command -v node >/dev/null || packages+=(nodejs)
  command -v npm >/dev/null || packages+=(npm)
  [[ -n ${NATS_SERVER_BIN:-} ]] || command -v nats-server >/dev/null || packages+=(nats-server)
  # The page is looked at in a real browser.
  [[ -n ${CHROMIUM_BIN:-} ]] || command -v chromium >/dev/null || packages+=(chromium fonts-dejavu-core)
  [[ -n ${FIRESTORE_EMULATOR_HOST:-} ]] || command -v "${JAVA:-java}" >/dev/null || packages+=(default-jre-headless)
  if ((${#packages[@]} > 0)) || ! { rust_suits || command -v rustup >/dev/null; }; then
    may_install || missing_all "${packages[@]}"
    as_root apt-get update -q
    if ((${#packages[@]} > 0)); then
      install_packages "${packages[@]}"
    fi
  fi
  rust_suits || install_rust
  # Debian has no package of it: what to do is said.
  scripts/with-firestore-emulator --check || exit_missing
  for component in fmt clippy; do
    cargo "$component" --version >/dev/null 2>&1 || install_component "$component"
  done
  rustc --version
  cc --version | head -n 1
  "${NATS_SERVER_BIN:-nats-server}" --version
  python3 --version
  printf 'node %s, npm %s\n' "$(node --version)" "$(npm --version 2>/dev/null)"
  "${CHROMIUM_BIN:-chromium}" --version
}

rust_wanted() {
  sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml
}

rust_suits() {
  local found
  found=$(rustc --version 2>/dev/null | cut -d ' ' -f 2) || return 1
  [[ -n $found ]] && cargo --version >/dev/null 2>&1 || return 1
  [[ $(printf '%s\n' "$(rust_wanted)" "$found" | sort -V | head -n 1) == "$(rust_wanted)" ]]
}

as_root() {
  if ((EUID == 0)); then "$@"; else sudo -n "$@"; fi
}

may_install() {
  command -v apt-get >/dev/null && { ((EUID == 0)) || sudo -n true 2>/dev/null; }
}

install_packages() {
  printf 'installing %s\n' "$*"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

# Debian 12 has neither a Rust this new nor rustup; Debian 13 has rustup.
install_rust() {
  local wanted
  wanted=$(rust_wanted)
  if ! command -v rustup >/dev/null; then
    if may_install && LC_ALL=C apt-cache policy rustup 2>/dev/null | grep -q 'Candidate: [0-9]'; then
      install_packages rustup
    else
      missing "$(rust_missing)"
    fi
  fi
  rustup toolchain install "$wanted" --profile minimal --component rustfmt --component clippy
  export RUSTUP_TOOLCHAIN=$wanted
  rust_suits || missing "$(rust_missing)"
}

rust_missing() {
  printf 'Rust %s or newer with cargo; this Debian has none: install it from https://rustup.rs' "$(rust_wanted)"
}

# Names everything at once, where nothing can be installed from here.
missing_all() {
  if (($# > 0)); then
    printf 'missing: Debian packages; run: sudo apt-get install %s\n' "$*" >&2
  fi
  if ! { rust_suits || command -v rustup >/dev/null; }; then
    printf 'missing: %s\n' "$(rust_missing)" >&2
  fi
  scripts/with-firestore-emulator --check || true
  exit_missing
}

install_component() {
  local component=$1
  [[ $component != fmt ]] || component=rustfmt
  command -v rustup >/dev/null || missing "cargo $1 (Rust's component $component)"
  rustup component add "$component"
}

missing() {
  printf 'missing: %s\n' "$1" >&2
  exit_missing
}

exit_missing() {
  failed_because=3
  exit 3
}

# --- headings and the summary ------------------------------------------------------------------------------------

done_steps=()
current_step=''
failed_because=1

step() {
  current_step=$1
  shift
  printf '\n== %s\n' "$current_step"
  local began=$SECONDS
  # Not in a condition: that would switch `set -e` off inside the step.
  "$@"
  done_steps+=("$(printf '  ok      %-14s %4d s' "$current_step" $((SECONDS - began)))")
  current_step=''
}

summary() {
  local status=$?
  printf '\n== summary\n'
  if ((${#done_steps[@]} > 0)); then
    printf '%s\n' "${done_steps[@]}"
  fi
  # A step that is under way was broken off, whatever bash says the status is.
  if ((status == 0)) && [[ -z $current_step ]]; then
    printf 'valid, in %d s\n' "$SECONDS"
    exit 0
  fi
  printf '  FAILED  %s\nthe steps after it did not run\n' "$current_step"
  exit "$failed_because"
}

main "$@"
