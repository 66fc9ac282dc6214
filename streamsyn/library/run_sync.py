"""`run_sync`: a whole run, blocking."""

from streamsyn.library.arguments import ConfigLike, Overrides, PathLike, Seeds, Servers, make_request
from streamsyn.library.run_thread import failure, run_to_end
from streamsyn.pipeline.request import RunSummary
from streamsyn.telemetry import log_through_logging


def run_sync(
    config: ConfigLike | None = None,
    *,
    out: PathLike,
    seeds: Seeds | None = None,
    servers: Servers | None = None,
    launch: str | None = None,
    limit: int | None = None,
    overrides: Overrides = (),
    preflight: bool = True,
) -> RunSummary:
    """Run until every seed has its outcome, and return the summary: `streamsyn run` as a function.

    In the main thread, Ctrl-C drains the run: what is in flight is finished, for at most
    `run.drain_timeout_s`, and the summary is returned, whose `stopped` has the reason. A second Ctrl-C stops
    the run at once. The same call resumes.

    Args:
        config: A TOML file, a dict of its sections, or a `Config`. By default the configuration that `out`
            was begun with, if it exists.
        out: The run directory; an existing one is resumed.
        seeds: A path or a list of paths, or an iterable or asynchronous iterable of dicts, which is iterated
            over in a thread. By default `seeds.sources` of the configuration.
        servers: URLs of servers, or dicts with `url`, `weight` and `key_env`, in place of `fleet.servers`.
        launch: Model to start a local SGLang server with for this run.
        limit: Read at most this many seeds.
        overrides: Dotted keys of the configuration and their values.
        preflight: Check a sample of the seeds, and one request, before a new run starts.

    Raises:
        ConfigError: A setting, an argument, a source of seeds or the directory cannot be used.
        DirectoryInUse: A run is writing to the directory.
        StoppedEarly: The run stopped early, but not by a signal; it can be resumed.
        TooManyRejects: Rejects exceed `run.max_reject_fraction`.
        SinkError: The log cannot be written; the directory can be resumed.
        LaunchError: The server to be launched did not come up.
        Exception: What the iterable of seeds raised.
    """
    log_through_logging()
    request, feed = make_request(
        config,
        out=out,
        seeds=seeds,
        servers=servers,
        launch=launch,
        limit=limit,
        overrides=overrides,
        preflight=preflight,
        show_progress=False,
    )
    summary = run_to_end(request, feed)
    error = failure(summary, request.config.run.max_reject_fraction)
    is_asked_for = summary.stopped is not None and summary.interrupted and not summary.too_many_rejects
    if error is not None and not is_asked_for:
        raise error
    return summary
