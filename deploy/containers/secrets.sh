#!/usr/bin/env bash
# Checked: run. Makes the secrets of compose.yaml once; prints the token of the operator.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
mkdir -p secrets
chmod 700 secrets # the files in it are read by the users of the containers
token() { head -c 24 /dev/urandom | base64 | tr '+/' '-_'; }
hash() { printf %s "$1" | sha256sum | cut -d' ' -f1; }
[[ ! -e secrets/tokens ]] || { echo "secrets/tokens exists" >&2; exit 1; }
operator=$(token) trainer=$(token) prometheus=$(token)
printf %s "$prometheus" > secrets/prometheus_token
token > secrets/grafana_password
{
  echo "operator admin sha256:$(hash "$operator")"
  echo "trainer write sha256:$(hash "$trainer")"
  echo "prometheus read sha256:$(hash "$prometheus")"
} > secrets/tokens
chmod 644 secrets/*
echo "TOKEN=$operator"
echo "STREAMSYN_TOKEN=$trainer"
