"""ray.data.llm: its HTTP processor."""

import os
from typing import Any

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS="1", RAY_DATA_DISABLE_PROGRESS_BARS="1")

import ray
from common import MAX_TOKENS, MODEL, parse, report
from ray.data.llm import HttpRequestProcessorConfig, build_processor


def before(row: dict[str, Any]) -> dict[str, Any]:
    """The request of a row."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": row["prompt"]}],
        "max_tokens": MAX_TOKENS,
    }
    return {"prompt": row["prompt"], "payload": body}


def after(row: dict[str, Any]) -> dict[str, Any]:
    """The row that is written."""
    return {"prompt": row["prompt"], "text": row["http_response"]["choices"][0]["message"]["content"]}


def main() -> None:
    job = parse()
    ray.init(num_cpus=4, include_dashboard=False, logging_level="WARNING", object_store_memory=200 << 20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    config = HttpRequestProcessorConfig(
        url=f"{job.url}/v1/chat/completions", batch_size=8, concurrency=4, max_retries=10
    )
    processor = build_processor(config, preprocess=before, postprocess=after)
    rows = processor(ray.data.from_items([{"prompt": text} for text in job.texts()]))
    folder = str(job.out / "rows")
    rows.write_json(folder)
    report(job, [row["prompt"] for row in ray.data.read_json(folder).iter_rows()])
    ray.shutdown()


if __name__ == "__main__":
    main()
