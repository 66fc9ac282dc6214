"""Traces of the daemon: all runs export to one collector."""

from tests.daemon.conftest import StartDaemon
from tests.pipeline.test_traces import Collector


async def test_runs_share_an_exporter(start_daemon: StartDaemon) -> None:
    collector = Collector()
    async with collector.listening() as url, start_daemon({"run.traces": url}) as served:
        for run_id, seeds in (("a", 3), ("b", 2)):
            await served.new_run(run_id)
            await served.submit(run_id, seeds)
            await served.ask("POST", f"/v1/runs/{run_id}/close")
        for run_id in ("a", "b"):
            await served.until_state(run_id, "finished")
    assert 5 == len([span for span in collector.spans if span.name == "draft"])
    assert 1 == collector.exporters
