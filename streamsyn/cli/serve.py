"""`streamsyn serve`: the daemon."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from streamsyn.cli.options import (
    CLUSTER,
    LOG_JSON,
    SERVER,
    SETTINGS,
    cluster_overrides,
    examples,
    with_options,
)


@click.command(
    epilog=examples(
        "streamsyn serve runs --server http://gpu-1:30000",
        "streamsyn serve /var/lib/streamsyn serve.toml --listen 0.0.0.0:8200",
    )
)
@click.argument("root", type=click.Path(path_type=Path, file_okay=False))
@click.argument("config", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--listen", metavar="HOST:PORT", help="Address to listen at.  [default: 127.0.0.1:8200]")
@SERVER
@with_options(CLUSTER)
@SETTINGS
@LOG_JSON
def serve(
    root: Path,
    config: Path | None,
    listen: str | None,
    server: tuple[str, ...],
    settings: tuple[str, ...],
    *,
    log_json: bool,
    **cluster: Any,
) -> None:
    """Hold many runs over one fleet, and serve them over HTTP: seeds in, samples out.

    Runs are in ROOT/runs; those that were going on go on when the daemon starts again. The first signal
    drains, a second one ends at once; SIGHUP reads tokens and limits again. Addresses that other machines
    can reach need serve.tokens_file.
    """
    from streamsyn.config.loading import load, parse_override
    from streamsyn.daemon.serve import serve as serve_root
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=log_json)
    overrides: list[tuple[str, Any]] = [] if listen is None else [("serve.listen", listen)]
    if server:
        overrides.append(("fleet.servers", list(server)))
        overrides += [("fleet.servers_file", None), ("fleet.servers_dns", None)]
    overrides += [*cluster_overrides(cluster), *map(parse_override, settings)]
    serve_root(root, partial(load, config, overrides))
