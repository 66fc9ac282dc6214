"""The files in deploy/ against the project's own configuration, commands, ports and paths."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import streamsyn
from streamsyn.cli.main import cli
from streamsyn.config.loading import Config, load
from streamsyn.daemon.health_routes import ROUTES
from streamsyn.slurm import SlurmJob
from tests.examples import in_turn

DEPLOY = Path(streamsyn.__file__).parents[1] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
SERVER_PATHS = {"/health", "/v1/models"}
"""What SGLang answers, and probes may ask."""
FLAGS = set((DEPLOY / "sglang" / "flags.txt").read_text("utf-8").split())


def resources(folder: str) -> list[dict[str, Any]]:
    """The resources that a kustomization lists, without what it is built upon."""
    listed = yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text("utf-8"))["resources"]
    return [
        resource
        for name in listed
        if name.endswith(".yaml")
        for resource in yaml.safe_load_all((KUBERNETES / folder / name).read_text("utf-8"))
    ]


def one(folder: str, kind: str, name: str) -> dict[str, Any]:
    """The spec of a resource."""
    [found] = [
        resource["spec"]
        for resource in resources(folder)
        if (resource["kind"], resource["metadata"]["name"]) == (kind, name)
    ]
    return dict(found)


def within(tree: Any, key: str) -> Iterator[Any]:
    """Each value of a key, at any depth."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from within(value, key)
    elif isinstance(tree, list):
        for part in tree:
            yield from within(part, key)


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "containers" / "compose.yaml").read_text("utf-8"))
    return found


def parses(words: list[str]) -> None:
    """Parse the arguments of a command of ours, and run nothing."""
    cli.commands[words[0]].make_context(
        words[0], [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in words[1:]]
    )


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


@pytest.fixture(scope="module")
def defaults() -> Config:
    return load(None)


@in_turn("path", [str(path.relative_to(DEPLOY)) for path in sorted(DEPLOY.rglob("*.yaml"))])
def test_every_manifest_parses(path: str) -> None:
    """Each document in it is a mapping."""
    documents = list(yaml.safe_load_all((DEPLOY / path).read_text("utf-8")))

    assert documents
    assert all(isinstance(document, dict) for document in documents)


@in_turn("path", [str(path.relative_to(DEPLOY)) for path in sorted(DEPLOY.rglob("*.toml"))])
def test_every_configuration_loads(path: str) -> None:
    """With keys that exist, and values that are allowed."""
    load(DEPLOY / path)


def every_flag() -> Iterator[tuple[str, str]]:
    """The flags of SGLang that deployments use, with the file."""
    for path in (DEPLOY / "systemd" / "sglang@.service", DEPLOY / "sglang" / "README.md"):
        text = path.read_text("utf-8")
        blocks = re.findall(r"^(?:ExecStart|# {3}SGLANG_ARGS)=(.*)$", text, re.MULTILINE)
        blocks += re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        blocks += re.findall(r"`(--[^`]*)`", text)
        for flag in re.findall(r"(?<!\S)(--[a-z][\w-]*)", "\n".join(blocks)):
            yield path.name, flag
    commands = [compose()["services"]["sglang"]["command"]]
    for folder in ("base", "multi-host"):
        commands += [args for args in within(resources(folder), "args") if args[0].startswith("--model-path")]
    commands.append([*SlurmJob(out=Path("out"), model="m", nodes=1).flags()])
    commands.append(re.findall(r"--[a-z-]+", "--host --port --base-gpu-id --node-rank --dist-init-addr"))
    for command in commands:
        for word in command:
            if word.startswith("--"):
                yield "a command", word.partition("=")[0]


def test_every_flag_of_sglang_exists() -> None:
    """In the list that deploy/sglang/list_flags.py printed from SGLang's own parser."""
    used = [(where, flag) for where, flag in every_flag() if flag not in {"--nodes", "--model"}]

    assert len(used) > 60
    assert set() == {(where, flag) for where, flag in used if flag not in FLAGS}


def test_all_name_one_version_of_sglang() -> None:
    """The one that deploy/sglang-cpu installs, with which tests and flags.txt were made."""
    pinned = (DEPLOY / "sglang-cpu" / "requirements-no-deps.txt").read_text("utf-8")
    [version] = re.findall(r"^sglang==(\S+)", pinned, re.MULTILINE)

    assert f"SGLang {version}." in (DEPLOY / "sglang" / "flags.txt").read_text("utf-8").splitlines()[0]
    assert f"SGLang {version}," in (DEPLOY / "sglang" / "README.md").read_text("utf-8")
    assert compose()["services"]["sglang"]["image"].endswith(f":v{version}}}")
    for folder in ("base", "multi-host"):
        listed = yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text("utf-8"))["images"]
        assert [f"v{version}"] == [image["newTag"] for image in listed if image["name"] == "sglang"]


def test_the_units_run_commands_of_ours(defaults: Config) -> None:
    """Their options exist; a stop lasts longer than a drain, and a watchdog has a readiness to start from."""
    for name in ("streamsyn.service", "streamsyn-train@.service"):
        unit = (DEPLOY / "systemd" / name).read_text("utf-8")
        [command] = re.findall(r"^ExecStart=/opt/streamsyn/bin/streamsyn (.*)$", unit, re.MULTILINE)
        parses(shlex.split(command))
    daemon = (DEPLOY / "systemd" / "streamsyn.service").read_text("utf-8")
    assert "Type=notify" in daemon
    assert "WatchdogSec=" in daemon
    assert float(re.findall(r"^TimeoutStopSec=(\d+)", daemon, re.MULTILINE)[0]) > defaults.run.drain_timeout_s
    server = (DEPLOY / "systemd" / "sglang@.service").read_text("utf-8")
    assert (
        float(re.findall(r"^TimeoutStopSec=(\d+)", server, re.MULTILINE)[0])
        > defaults.fleet.request_timeout_s
    )


def test_compose_agrees_with_the_configuration(defaults: Config) -> None:
    """Ports, names of services, mounted files, times to stop; everything but SGLang has a read-only root."""
    services = compose()["services"]
    config = load(DEPLOY / "containers" / "serve.toml")
    port = config.serve.listen.rpartition(":")[2]
    assert [f"127.0.0.1:{port}:{port}"] == services["streamsyn"]["ports"]
    assert ("http://sglang:30000",) == config.fleet.servers
    assert "--port=30000" in services["sglang"]["command"]
    assert str(config.serve.tokens_file) == f"/run/secrets/{services['streamsyn']['secrets'][0]}"
    assert seconds(services["streamsyn"]["stop_grace_period"]) > defaults.run.drain_timeout_s
    assert seconds(services["sglang"]["stop_grace_period"]) > defaults.fleet.request_timeout_s
    parses(services["train"]["command"])
    for name, service in services.items():
        assert service.get("read_only") is (None if name == "sglang" else True), name
        for volume in service.get("volumes", []):
            if volume.startswith((".", "..")):
                assert (DEPLOY / "containers" / volume.partition(":")[0]).exists(), volume
        assert set(service.get("secrets", [])) <= set(compose()["secrets"])
    scraped = yaml.safe_load((DEPLOY / "containers" / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    targets = [target for job in scraped for static in job["static_configs"] for target in static["targets"]]
    assert {"streamsyn:8200", "sglang:30000"} == set(targets)


def test_the_image_runs_the_daemon_without_root() -> None:
    """Its base is pinned by digest, its command is ours, and it copies files that exist."""
    text = (DEPLOY / "containers" / "Dockerfile").read_text("utf-8")
    assert re.search(r"^ARG PYTHON=\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert {"${PYTHON}", "build", "base"} == set(re.findall(r"^FROM (\S+)", text, re.MULTILINE))
    assert "USER 10001:10001" in text
    *_, command = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    parses(yaml.safe_load(command))
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert all((DEPLOY.parent / path).exists() for path in line.split())
    ignored = (DEPLOY / "containers" / "Dockerfile.dockerignore").read_text("utf-8")
    copied = {
        path for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for path in line.split()
    }
    assert copied == set(re.findall(r"^!(\S+)$", ignored, re.MULTILINE))


def test_kubernetes_agrees_with_the_configuration(defaults: Config) -> None:
    """The service that the fleet looks up, the daemon's port, its tokens, its probes, and times to drain."""
    config = load(KUBERNETES / "base" / "serve.toml")
    service, servers = one("base", "Service", "sglang"), one("base", "StatefulSet", "sglang")
    assert f"http://sglang:{service['ports'][0]['port']}" == config.fleet.servers_dns
    assert "None" == service["clusterIP"]
    assert "sglang" == servers["serviceName"]
    daemon = one("base", "StatefulSet", "streamsyn")
    pod = daemon["template"]["spec"]
    assert 1 == daemon["replicas"]
    assert int(config.serve.listen.rpartition(":")[2]) == pod["containers"][0]["ports"][0]["containerPort"]
    assert config.serve.listen.startswith("0.0.0.0:")
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert config.serve.tokens_file == Path(mounts["tokens"]) / "tokens"
    parses(pod["containers"][0]["args"])
    assert pod["containers"][0]["args"][1] == mounts["root"]
    assert pod["terminationGracePeriodSeconds"] > defaults.run.drain_timeout_s
    open_paths = {route.path for route in ROUTES if route.scope == "open"}
    assert open_paths == {probe["path"] for probe in within(daemon, "httpGet")}


@in_turn("folder", ["base", "multi-host"])
def test_servers_leave_the_service_before_they_stop(folder: str, defaults: Config) -> None:
    """preStop outlasts two look-ups of the fleet, and what runs has its whole time after that."""
    pods = [spec for spec in within(resources(folder), "spec") if "containers" in spec]
    servers = [pod for pod in pods if pod["containers"][0]["image"] == "sglang"]
    assert servers
    for pod in servers:
        pause = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pause >= 2 * defaults.fleet.discover_interval_s
        assert pod["terminationGracePeriodSeconds"] > defaults.fleet.request_timeout_s + min(pause, 20)
        assert {probe["path"] for probe in within(pod, "httpGet")} <= SERVER_PATHS


@in_turn("folder", ["base", "multi-host", "kuberay", "kuberay-job"])
def test_what_is_named_is_there(folder: str) -> None:
    """Selectors find pods, probes and monitors find ports, mounts find volumes, images have their names."""
    found = resources(folder)
    labels = [
        template["metadata"]["labels"] for template in within(found, "template") if "metadata" in template
    ]
    for selector in within(found, "matchLabels"):
        assert any(selector.items() <= one.items() for one in labels), selector
    for pod in (spec for spec in within(found, "spec") if "containers" in spec):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        claimed = {
            claim["metadata"]["name"] for claims in within(found, "volumeClaimTemplates") for claim in claims
        }
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes | claimed
            ports = {port["name"] for port in container.get("ports", [])}
            assert {probe["port"] for probe in within(container, "httpGet")} <= ports
            assert container["image"] in images(folder)
    services = [
        port for resource in found if resource["kind"] == "Service" for port in resource["spec"]["ports"]
    ]
    for monitor in (resource["spec"] for resource in found if resource["kind"] == "ServiceMonitor"):
        assert {endpoint["port"] for endpoint in monitor["endpoints"]} <= {port["name"] for port in services}
        assert "app" == monitor["jobLabel"]


def test_the_job_submits_a_run() -> None:
    """Options of the commands, files on the volume of all nodes, on nodes like those of the cluster."""
    job = one("kuberay-job", "RayJob", "first")
    program, name, *words = shlex.split(job["entrypoint"])
    with cli.commands[name].make_context(name, words) as context:
        command, *arguments = context.params["command"]
    given = cli.commands[command].make_context(command, arguments).params
    assert ("streamsyn", "submit", "run") == (program, name, command)
    assert all(Path(path).is_relative_to("/runs") for path in (given["out"], *given["seeds"]))
    assert given["ray"]
    assert one("kuberay", "RayCluster", "streamsyn") == job["rayClusterSpec"]
    assert {"runs"} == {claim["claimName"] for claim in within(job, "persistentVolumeClaim")}
    assert one("kuberay", "PersistentVolumeClaim", "runs")


def images(folder: str) -> set[str]:
    """Names of images that a kustomization replaces by those of a registry."""
    listed = yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text("utf-8"))
    return {image["name"] for image in listed["images"]}


CHECKED = re.compile(r"Checked: (?:run|validated|neither|`)[^\n]*(?:\n[^\n#]+)*")
FILES = [path for path in sorted(DEPLOY.rglob("*")) if path.is_file() and path.parent.name != "__pycache__"]


@in_turn("path", [str(path.relative_to(DEPLOY)) for path in FILES])
def test_every_file_says_how_it_was_checked(path: str) -> None:
    """Run, validated by a tool or a test, or neither: in the file, or by name in the README of its folder."""
    file = DEPLOY / path
    own = "" if file.suffix == ".png" else file.read_text("utf-8")
    folder = DEPLOY / file.relative_to(DEPLOY).parts[0] if file.parent != DEPLOY else DEPLOY
    page = folder / "README.md"
    said = CHECKED.search(page.read_text("utf-8")) if page.exists() else None

    assert CHECKED.search(own) or (said and f"`{file.name}`" in said[0]), path


def test_a_wrong_option_does_not_parse() -> None:
    """So that the tests above can fail."""
    with pytest.raises(click.UsageError):
        parses(["serve", "root", "--log-jsonl"])
    assert "--enable-cache-reports" not in FLAGS
