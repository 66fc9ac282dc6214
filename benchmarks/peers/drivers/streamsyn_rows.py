"""streamsyn itself, contexts in the durable log and samples of one context each."""

from common import parse, report

import streamsyn


def main() -> None:
    job = parse()
    out = job.out / "run"
    streamsyn.run_sync(
        seeds=job.prompts.with_name("seeds.jsonl"),
        out=out,
        servers=[job.url],
        overrides={"fleet.concurrency": job.concurrency, "assembly.contexts_per_sample": 1},
    )
    report(job, [row["instruction"] for row in streamsyn.follow(out, kind="contexts")])


if __name__ == "__main__":
    main()
