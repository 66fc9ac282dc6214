#!/usr/bin/env bash
# Installs sglang-router, which benchmarks/prefix.py compares streamsyn's placement with.
#
#   deploy/sglang-router/install.sh
#
# into $STREAMSYN_ROUTER_HOME (default: .sglang-router at the root of this repository): venv/.
# Called again, it does nothing until a file of this folder changes. An interrupted install is begun anew.
# $PYTHON names the interpreter to build on (default: python3; 3.11 or newer).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=$(realpath -m "${STREAMSYN_ROUTER_HOME:-$here/../../.sglang-router}")
python=${PYTHON:-python3}

say() { printf 'sglang-router: %s\n' "$*" >&2; }

# A hash of everything that shapes the result: each file of this folder but the documentation.
inputs() {
  (cd "$here" && find . -type f ! -name '*.md' -print0 | sort -z | xargs -0 sha256sum) |
    sha256sum | cut -d ' ' -f 1
}

finished() {
  [[ -x $home/venv/bin/python && -f $home/stamp && $(<"$home/stamp") == "$(inputs)" ]]
}

install() {
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "needs Python 3.11 or newer; name one with PYTHON=..."
    exit 1
  fi
  rm -rf "$home/stamp" "$home/venv"
  say "installing into $home: 40 MB to download, 150 MB on disk, half a minute"
  "$python" -m venv "$home/venv"
  "$home/venv/bin/python" -m pip install -qq --disable-pip-version-check --no-cache-dir \
    -r "$here/requirements.txt" -c "$here/constraints.txt"
  say "checking that the router can be started"
  "$home/venv/bin/python" -m sglang_router.launch_router --help >/dev/null
  inputs >"$home/stamp"
  say "installed in ${SECONDS} s ($(du -sh "$home" | cut -f 1))"
}

main() {
  mkdir -p "$home"
  exec 9>"$home/lock"
  flock 9  # two at once: the second waits, and then finds everything in place
  if finished; then
    say "already installed in $home"
  else
    install
  fi
}

main
