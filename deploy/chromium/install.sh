#!/usr/bin/env bash
# Checked: run, by `make test-browser`.
# Installs Chromium, in which the tests look at what `streamsyn report` writes.
#
#   deploy/chromium/install.sh
#
# Does nothing where there is a browser of this kind already. Otherwise apt-get installs Debian's package, as
# root or through sudo; where neither can be had, one line says what to install.
set -euo pipefail

say() { printf 'chromium: %s\n' "$*" >&2; }

for name in chromium chromium-browser google-chrome google-chrome-stable; do
  if path=$(command -v "$name"); then
    say "already installed: $path"
    exit 0
  fi
done

if ! command -v apt-get >/dev/null; then
  say "there is no apt-get here; install chromium or google-chrome by hand"
  exit 1
fi
as_root=()
if [[ $(id -u) -ne 0 ]]; then
  if ! sudo -n true 2>/dev/null; then
    say "installing needs root: run 'sudo apt-get install chromium', or leave these tests out with -m 'not chromium'"
    exit 1
  fi
  as_root=(sudo -n)
fi
say "installing Debian's chromium: 100 MB to download"
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
command -v chromium >/dev/null || { say "apt-get installed no chromium"; exit 1; }
say "installed in ${SECONDS} s"
