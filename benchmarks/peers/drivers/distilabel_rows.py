"""distilabel: a pipeline of two steps with its cache on. The rows of a batch are asked for at a time."""

import os

os.environ.update(HF_HUB_OFFLINE="1")

from common import MAX_TOKENS, MODEL, parse, report
from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration


def main() -> None:
    job = parse()
    rows = [{"instruction": text} for text in job.texts()]
    llm = OpenAILLM(
        model=MODEL,
        base_url=f"{job.url}/v1",
        api_key="none",
        generation_kwargs={"max_new_tokens": MAX_TOKENS},
    )
    with Pipeline(name="rows", cache_dir=job.out / "cache") as pipeline:
        load = LoadDataFromDicts(data=rows, batch_size=job.concurrency)
        load >> TextGeneration(llm=llm, input_batch_size=job.concurrency)
    written = pipeline.run(use_cache=True)["default"]["train"]
    report(job, [row["instruction"] for row in written if row["generation"] is not None])


if __name__ == "__main__":
    main()
