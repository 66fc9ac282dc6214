# shellcheck shell=bash disable=SC2154 # the caller sets $python
# Sourced by the scripts that install packages; "$python" names the interpreter.
#
# uv downloads and unpacks in parallel: it takes less than half of pip's time.
uv_version=0.13.9

# Installs uv into a folder, from where pip is told to look.
install_uv() {
  "$python" -m pip install -qq --disable-pip-version-check --root-user-action ignore --no-cache-dir \
    --target "$1" "uv==$uv_version"
}

pip_setting() {
  "$python" -m pip config list 2>/dev/null | sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" | sed -n 1p
}

# uv does not read pip's settings, so pass on where this machine's pip is told to look, and pip's rule that the
# best version of all wins.
uv_settings() {
  local index extra links
  index=$(pip_setting index-url) extra=$(pip_setting extra-index-url) links=$(pip_setting find-links)
  export UV_INDEX_STRATEGY=unsafe-best-match UV_NO_CONFIG=1 UV_NO_CACHE=1 UV_HTTP_TIMEOUT=180
  if [[ -n $index ]]; then export UV_DEFAULT_INDEX=$index; fi
  if [[ -n $extra ]]; then export UV_INDEX=${extra//\\n/ }; fi
  if [[ -n $links ]]; then links=${links//\\n/ }; export UV_FIND_LINKS=${links// /,}; fi
}
