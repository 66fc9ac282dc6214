"""`streamsyn run --partitions N`: a coordinator process for each partition, with --ray on other machines."""

import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamsyn.cli.exits import EXIT_REJECTS, fail
from streamsyn.cli.options import resolve
from streamsyn.cluster import needing_ray
from streamsyn.errors import ConfigError, root_cause
from streamsyn.plain_text import visible

if TYPE_CHECKING:
    from streamsyn.cluster.coordinator import RunCommand
    from streamsyn.cluster.placing import Servers
    from streamsyn.config.loading import Config
    from streamsyn.pipeline.coordinator_process import Launch
    from streamsyn.pipeline.coordinators import Coordinators
    from streamsyn.sink.partitions import Partitions

_REFUSED = {
    "to_stdout": "--stdout: follow the run beside it, with streamsyn.follow(OUT)",
    "train": "--train: train beside it, with `streamsyn train --from OUT`",
    "launch": "--launch: start the server first, and pass --server",
}
"""Options that are those of one coordinator, and what to do instead."""


def partitions_of(given: Mapping[str, Any]) -> int | None:
    """Return the number of partitions that is asked for, or that OUT has; None for a run without them."""
    from streamsyn.sink.partitions import read_partitions

    if given["partitions"] is not None:
        return int(given["partitions"])
    found = read_partitions(given["out"])
    return None if found is None else found.number


def run_partitions(given: dict[str, Any], number: int) -> None:
    """Run the coordinators, print their summary, and exit with the worst of their codes."""
    import asyncio

    from streamsyn.sink.partitions import claimed_partitions
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=given["log_json"])
    for name, advice in _REFUSED.items():
        if given[name]:
            raise ConfigError(f"--partitions cannot be combined with {advice}")
    out: Path = given["out"]
    asked = resolve(given, None)
    if any(source.path == "-" for source in asked.seeds.sources):
        raise ConfigError(
            "--partitions reads seeds once for each partition: write those of stdin to a file first"
        )
    # To take over, each coordinator takes its own directory, too: what older ones write counts for nothing.
    with claimed_partitions(out, number, takes_over=given["take_over"]) as partitions:
        try:
            coordinators, code = asyncio.run(_run(given, asked, partitions))
        except BaseExceptionGroup as group:
            raise root_cause(group) from None
        _summarise(coordinators, as_json=given["log_json"])
        allowed = resolve(given, partitions.directories[0]).run.max_reject_fraction
        _exit(coordinators, code, allowed)


async def _run(
    given: Mapping[str, Any], asked: "Config", partitions: "Partitions"
) -> "tuple[Coordinators, int]":
    """Run the coordinators to their ends, here or on a cluster; return them, and the worst exit code."""
    from streamsyn.pipeline.coordinator_process import command_here, started_here
    from streamsyn.pipeline.coordinators import Coordinators

    as_json, waits = given["log_json"], not given["take_over"]
    directories, options = partitions.directories, _options(given)
    each = [[*options, *_own_settings(asked, at, partitions.number)] for at in range(partitions.number)]
    if asked.cluster.address is None:
        launch = started_here(lambda at: command_here(each[at], directories[at]))
        coordinators = Coordinators(partitions, launch, as_json=as_json, waits=waits)
        return coordinators, await coordinators.run()
    async with _on_cluster(asked, partitions, each) as (launch, servers):
        coordinators = Coordinators(partitions, launch, as_json=as_json, waits=waits)
        if servers is None:
            return coordinators, await coordinators.run()
        servers.demand = coordinators.demand
        return coordinators, await coordinators.run(servers.ready)


@asynccontextmanager
async def _on_cluster(
    asked: "Config", partitions: "Partitions", each: Sequence[Sequence[str]]
) -> "AsyncIterator[tuple[Launch, Servers | None]]":
    """Place servers, if a model is given; yields what places coordinators, and the servers.

    Args:
        asked: The configuration.
        partitions: OUT.
        each: The options of the coordinator of each partition.
    """
    from streamsyn.pipeline.coordinator_process import arguments
    from streamsyn.pipeline.setup import on_cluster

    section, root = asked.cluster, partitions.root.absolute()
    async with AsyncExitStack() as stack:
        servers = None
        fleet = asked.fleet
        if section.model is not None or not (fleet.servers or fleet.servers_file or fleet.servers_dns):
            servers = await stack.enter_async_context(on_cluster(section, waits=False))
        with needing_ray("cluster.address"):
            from streamsyn.cluster.coordinator import command_of
            from streamsyn.cluster.placed_coordinators import placing_coordinators

        def command(at: int) -> "RunCommand":
            own = arguments(each[at], root / partitions.directories[at].name)
            return command_of([*own, "--told-servers"] if servers else own, root)

        placing = placing_coordinators(section.address or "auto", command, servers)
        yield (await stack.enter_async_context(placing)).launch, servers


def _options(given: Mapping[str, Any]) -> list[str]:
    """The options that the run was started with, for a coordinator."""
    options = [] if given["config"] is None else [str(given["config"])]
    for name, option in (("seeds", "--seeds"), ("server", "--server"), ("settings", "--set")):
        options += [text for value in given[name] for text in (option, str(value))]
    if given["limit"] is not None:
        options += ["--limit", str(given["limit"])]
    flags = {"no_preflight": "--no-preflight", "take_over": "--take-over"}
    return options + [flag for name, flag in flags.items() if given[name]]


def _own_settings(asked: "Config", at: int, number: int) -> list[str]:
    """The settings that differ for one coordinator.

    A fixed number of requests per server is shared out. What a coordinator finds by itself (`auto`) is not:
    the load that a server reports is that of all coordinators.
    """
    fleet, sink, run = asked.fleet, asked.sink, asked.run
    fixed = {
        key: getattr(fleet, key) for key in ("concurrency", "max_in_flight") if key in fleet.model_fields_set
    }
    shares = {
        key: max(1, most // number + (at < most % number)) for key, most in fixed.items() if most != "auto"
    }
    settings = [
        f'seeds.partition="{at}/{number}"',
        *(f"fleet.{key}={share}" for key, share in shares.items()),
    ]
    if sink.mirror:
        settings.append(f'sink.mirror="{sink.mirror.rstrip("/")}/partition-{at:03d}"')
    if run.metrics_listen:
        host, _, port = run.metrics_listen.rpartition(":")
        settings.append(f'run.metrics_listen="{host}:{int(port) + at}"')
    return [text for setting in settings for text in ("--set", setting)]


def _summarise(coordinators: "Coordinators", *, as_json: bool) -> None:
    """Print the summary of all partitions, or log it as run.done."""
    import structlog

    from streamsyn.pipeline.progress import duration

    kinds = ("contexts", "rejects", "samples")
    now = {kind: coordinators.total(kind) for kind in kinds}
    there = {kind: coordinators.total("directory", kind) for kind in kinds}
    stopped = {one.at: one.done["stopped"] for one in coordinators.each if one.done.get("stopped")}
    out = coordinators.partitions.root
    if as_json:
        structlog.get_logger().info(
            "run.done",
            out=str(out),
            stopped="; ".join(sorted(set(stopped.values()))) or None,
            seconds=round(coordinators.seconds, 3),
            **{**now, "rejects": dict(coordinators.rejects())},
            finished_before=coordinators.total("finished_before"),
            directory=there,
            partitions=[
                {"partition": one.at, "exit_code": one.code, **one.done} for one in coordinators.each
            ],
        )
        return
    how = "done" if coordinators.partitions.has_ended else "stopped early"
    lines = [f"{how} after {duration(coordinators.seconds)}"]
    rate = (now["contexts"] + now["rejects"]) / max(coordinators.seconds, 1e-9)
    lines.append(
        f"  this run   {now['contexts']:,} contexts, {now['rejects']:,} rejects, {now['samples']:,} samples; "
        f"{rate:,.1f} outcomes/s"
    )
    if rejects := coordinators.rejects():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in rejects.most_common())
        lines.append(f"  rejects    {reasons}")
    lines += [f"  partition  {at}: stopped early ({why})" for at, why in stopped.items()]
    lines += [f"  partition  {one.at}: {one.error}" for one in coordinators.each if one.code and one.error]
    lines.append(
        f"  directory  {out}: {there['contexts']:,} contexts, {there['rejects']:,} rejects, "
        f"{there['samples']:,} samples in {len(coordinators.each)} partitions"
    )
    if not coordinators.partitions.has_ended:
        lines.append(f"  resume     run again with --out {out}")
    for line in lines:
        click.echo(visible(line), err=True)


def _exit(coordinators: "Coordinators", code: int, allowed: float) -> None:
    """Exit with the worst code. Rejects are judged over all partitions once all have ended."""
    if code in (0, EXIT_REJECTS) and coordinators.partitions.has_ended:
        rejects = coordinators.total("directory", "rejects")
        share = rejects / max(1, rejects + coordinators.total("directory", "contexts"))
        if share > allowed:
            fail(
                f"rejects are {share:.1%} of the outcomes, more than run.max_reject_fraction = {allowed:.1%}",
                EXIT_REJECTS,
                prefix="",
            )
        return
    if code:
        sys.exit(code)
