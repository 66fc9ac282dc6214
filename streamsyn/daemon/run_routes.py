"""`/v1/runs`: create, list, look at, steer and delete runs."""

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any, Final

from aiohttp import web
from pydantic import Field

from streamsyn.assembly.sample_prompts import SamplePrompts
from streamsyn.config.loading import Config
from streamsyn.daemon.bodies import JsonBody, json_body
from streamsyn.daemon.consumers import ConsumerState
from streamsyn.daemon.daemon import DAEMON
from streamsyn.daemon.hosted_run import HostedRun
from streamsyn.daemon.inline_templates import check_template
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.route import Route, boolean, checked_id, integer, json_response, one_of
from streamsyn.daemon.run_config import check_given, run_config, shaping_tree, template_layer, template_path
from streamsyn.daemon.run_record import STATES, Priority, RunRecord, State
from streamsyn.daemon.runs import new_id
from streamsyn.daemon.webhook_target import Webhook
from streamsyn.errors import ConfigError
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import RejectReason

MAX_PAGE: Final = 1000
Label = Annotated[str, Field(max_length=256)]


class Templates(JsonBody):
    """Texts of Jinja2 templates, in place of the packaged ones."""

    recipe: str | None = None
    assembly: str | None = None


class NewRun(JsonBody):
    """What a run is created from."""

    id: str | None = None
    config: dict[str, dict[str, Any]] = Field(default_factory=dict)
    weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    priority: Priority = "normal"
    labels: Annotated[dict[Label, Label], Field(max_length=64)] = Field(default_factory=dict)
    templates: Templates | None = None
    webhook: Webhook | None = None


class Retry(JsonBody):
    """Which rejects are asked again; all of them if no reasons are given."""

    reasons: list[str] | None = None


class Counts(JsonBody):
    """How many there are; `waiting` have been accepted and have no outcome yet."""

    accepted: int
    contexts: int
    rejects: int
    samples: int
    in_flight: int
    waiting: int


class Rates(JsonBody):
    """Rates of the last half minute."""

    outcomes_per_s: float
    output_tokens_per_s: float


class PrefixShares(JsonBody):
    """Shares of the prompt tokens that were planned to be cached, and were; null before any answer."""

    planned: float | None
    achieved: float | None


class LastRows(JsonBody):
    """The `seq` of the last row of each kind; null before the first."""

    contexts: int | None
    rejects: int | None
    samples: int | None


class Run(JsonBody):
    """A run."""

    id: str
    state: State
    accepting: bool
    created_at: float
    weight: float
    priority: Priority
    labels: dict[str, str]
    error: str | None
    counts: Counts
    rejects: dict[str, int]
    rates: Rates
    tokens: dict[str, int]
    prefix: PrefixShares
    last: LastRows
    consumers: list[ConsumerState]


class RunPage(JsonBody):
    """Some of the runs, newest first."""

    data: list[Run]
    has_more: bool


async def create_run(request: web.Request) -> web.Response:
    """Create a run, or return the one that the same request has created before."""
    daemon = request.app[DAEMON]
    new = await json_body(request, NewRun, is_optional=True)
    run_id = new_id() if new.id is None else checked_id(new.id)
    given = new.model_dump(mode="json", exclude_none=True, exclude={"id"})
    templates = given.get("templates") or {}
    if (webhook := new.webhook) is not None:
        webhook.check(daemon.hosting.environ, allow_private=daemon.config.serve.allow_private_webhooks)
        given["webhook"] = webhook.shown
    check_given(new.config, daemon.config)
    for name, text in templates.items():
        check_template(f"templates.{name}", text)
    config = await asyncio.to_thread(run_config, daemon.config, new.config)
    record = RunRecord(
        id=run_id,
        created_at=time.time(),
        weight=new.weight,
        priority=new.priority,
        labels=new.labels,
        given=given,
        shaping=shaping_tree(config),
    )
    files = {str(template_path(Path(), name)): text for name, text in templates.items()}

    def check(root: Path) -> None:
        _check(root, config=daemon.config, given=new.config, templates=templates)
        if webhook is not None:
            webhook.save(root, "run")

    run, is_new = await daemon.runs.create(record, files, check)
    return json_response(
        run.as_json(), 201 if is_new else 200, {"Location": f"/v1/runs/{run.id}"} if is_new else None
    )


def _check(root: Path, config: Config, given: dict[str, Any], templates: dict[str, str]) -> None:
    """Refuse a configuration or a template that cannot work. Blocks on the disk.

    Raises:
        ConfigError: It names what the client sent, not the file that it became.
    """
    try:
        resolved = run_config(config, given, template_layer(root, templates))
        load_recipe(resolved.recipe, resolved.checks)
        SamplePrompts(resolved.assembly)
    except ConfigError as error:
        text = str(error)
        for name in templates:
            text = text.replace(str(template_path(root, name)), f"templates.{name}")
        raise ConfigError(text) from error


async def list_runs(request: web.Request) -> web.Response:
    """List runs, newest first."""
    state = one_of(request, "state", STATES)
    limit = integer(request, "limit", 100, least=1, most=MAX_PAGE)
    data, has_more = await request.app[DAEMON].runs.page(
        state=state, after=request.query.get("after"), limit=limit
    )
    return json_response({"data": data, "has_more": has_more})


async def show_run(request: web.Request) -> web.Response:
    """Return a run."""
    return json_response((await requested_run(request)).as_json())


async def delete_run(request: web.Request) -> web.Response:
    """Remove a run and its directory."""
    force = boolean(request, "force")
    await request.app[DAEMON].runs.delete(request.match_info["id"], force=force)
    return web.Response(status=204)


async def close_run(request: web.Request) -> web.Response:
    """No more seeds will come."""
    run = await requested_run(request)
    await run.close()
    return json_response(run.as_json(), 202)


async def pause_run(request: web.Request) -> web.Response:
    """Begin nothing new."""
    run = await requested_run(request)
    await run.pause()
    return json_response(run.as_json(), 202)


async def resume_run(request: web.Request) -> web.Response:
    """Go on."""
    run = await requested_run(request)
    await run.resume()
    return json_response(run.as_json(), 202)


async def drain_run(request: web.Request) -> web.Response:
    """Begin nothing new, and refuse seeds."""
    run = await requested_run(request)
    await run.drain()
    return json_response(run.as_json(), 202)


async def retry_run(request: web.Request) -> web.Response:
    """Ask rejects again."""
    run = await requested_run(request)
    body = await json_body(request, Retry, is_optional=True)
    known = [str(reason) for reason in RejectReason]
    reasons = known if body.reasons is None else body.reasons
    if unknown := sorted(set(reasons) - set(known)):
        raise Problem(422, f"reasons: unknown {unknown[0]!r}; the reasons are {', '.join(known)}")
    if not reasons:
        raise Problem(422, "reasons: the list is empty; leave it out to ask all rejects again")
    await run.retry([RejectReason(reason) for reason in reasons])
    return json_response(run.as_json(), 202)


async def requested_run(request: web.Request) -> HostedRun:
    """Return the run that the path of a request names.

    Raises:
        Problem: 404: there is none.
    """
    return await request.app[DAEMON].runs.get(request.match_info["id"])


ROUTES: Final = (
    Route(
        method="POST",
        path="/v1/runs",
        handler=create_run,
        scope="write",
        summary="Create a run. The same request with the same id again returns the run.",
        body=NewRun,
        body_is_required=False,
        answers={200: Run, 201: Run},
        problems=(409, 507),
    ),
    Route(
        method="GET",
        path="/v1/runs",
        handler=list_runs,
        scope="read",
        summary="List runs, newest first.",
        answers={200: RunPage},
        problems=(404,),
        query={"state": str, "limit": int, "after": str},
    ),
    Route(
        method="GET",
        path="/v1/runs/{id}",
        handler=show_run,
        scope="read",
        summary="Return a run.",
        answers={200: Run},
        problems=(404,),
    ),
    Route(
        method="DELETE",
        path="/v1/runs/{id}",
        handler=delete_run,
        scope="admin",
        summary="Remove a run and its directory. One with work to do needs force=true.",
        answers={204: None},
        problems=(404, 409),
        query={"force": bool},
    ),
    *(
        Route(
            method="POST",
            path=f"/v1/runs/{{id}}/{action}",
            handler=handler,
            scope="write",
            summary=summary,
            body=body,
            body_is_required=False,
            answers={202: Run},
            problems=(404, 409, 507),
        )
        for action, handler, summary, body in (
            ("close", close_run, "Accept no more seeds; the run finishes once each has its outcome.", None),
            ("pause", pause_run, "Begin nothing new; seeds are still accepted.", None),
            ("resume", resume_run, "Go on. A finished run accepts seeds again.", None),
            ("drain", drain_run, "Begin nothing new, and refuse seeds until the run is resumed.", None),
            ("retry", retry_run, "Ask rejects again, by default all of them.", Retry),
        )
    ),
)
