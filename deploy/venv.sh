#!/usr/bin/env bash
# Makes a virtual environment with this project in it, editable.
#
#   deploy/venv.sh FOLDER ['[dev]']
#
# $PYTHON names the interpreter to build on (default: python3; 3.11 or newer). Without uv, pip does the work.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$1 wanted=.${2:-}
python=${PYTHON:-python3}
source deploy/uv.sh

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "streamsyn needs Python 3.11 or newer")'
[[ -x $folder/bin/python ]] || "$python" -m venv "$folder"
tool=$(mktemp -d)
trap 'rm -rf "$tool"' EXIT
if install_uv "$tool" 2>/dev/null; then
  uv_settings
  # What is imported is compiled then; all of it would take longer than its download.
  "$tool/bin/uv" pip install --quiet --python "$folder/bin/python" -c deploy/constraints.txt -e "$wanted"
else
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c deploy/constraints.txt -e "$wanted"
fi
