"""datatrove: InferenceRunner with an endpoint; with checkpoints if CHECKPOINTS is set."""

import json
import os
from typing import Any

from common import MAX_TOKENS, MODEL, parse, report
from datatrove.data import Document
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.writers import JsonlWriter


async def rollout(document: Document, generate: Any) -> dict[str, Any]:
    """Ask for one document."""
    answer = await generate(
        {"messages": [{"role": "user", "content": document.text}], "max_tokens": MAX_TOKENS}
    )
    return {"text": answer.text, "finish_reason": answer.finish_reason, "usage": answer.usage}


def main() -> None:
    job = parse()
    rows = job.out / "rows"
    config = InferenceConfig(
        server_type="endpoint",
        endpoint_url=job.url,
        model_name_or_path=MODEL,
        max_concurrent_generations=job.concurrency,
        max_concurrent_documents=job.concurrency,
        metric_interval=3600,
    )
    runner = InferenceRunner(
        rollout_fn=rollout,
        config=config,
        output_writer=JsonlWriter(
            str(rows), output_filename="${rank}_chunk_${chunk_index}.jsonl", compression=None
        ),
        checkpoints_local_dir=str(job.out / "checkpoints") if os.environ.get("CHECKPOINTS") else None,
        records_per_chunk=500,
    )
    runner.run((Document(text=text, id=str(at)) for at, text in enumerate(job.texts())), 0, 1)
    lines = [line for path in sorted(rows.glob("*.jsonl")) for line in path.read_text().splitlines()]
    report(job, [json.loads(line)["text"] for line in lines])


if __name__ == "__main__":
    main()
