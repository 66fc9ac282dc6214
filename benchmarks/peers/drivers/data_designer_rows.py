"""NeMo Data Designer: a seed data set and one column that an LLM writes, at a server of one's own."""

import os

os.environ.update(NEMO_TELEMETRY_ENABLED="false", HF_HUB_OFFLINE="1")

import data_designer.config as dd
import pandas as pd
from common import MAX_TOKENS, MODEL, parse, report
from data_designer.interface import DataDesigner


def main() -> None:
    job = parse()
    provider = dd.ModelProvider(
        name="server", endpoint=f"{job.url}/v1", provider_type="openai", api_key="none"
    )
    model = dd.ModelConfig(
        alias="writer",
        model=MODEL,
        provider="server",
        skip_health_check=True,
        inference_parameters=dd.ChatCompletionInferenceParams(
            max_tokens=MAX_TOKENS, max_parallel_requests=job.concurrency
        ),
    )
    prompts = pd.DataFrame({"prompt": list(job.texts())})
    builder = dd.DataDesignerConfigBuilder(model_configs=[model])
    builder.with_seed_dataset(dd.DataFrameSeedSource(df=prompts))
    builder.add_column(dd.LLMTextColumnConfig(name="text", model_alias="writer", prompt="{{ prompt }}"))
    designer = DataDesigner(artifact_path=job.out, model_providers=[provider])
    result = designer.create(
        config_builder=builder,
        num_records=len(prompts),
        dataset_name="rows",
        resume=dd.ResumeMode.IF_POSSIBLE,
    )
    report(job, list(result.load_dataset()["prompt"]))


if __name__ == "__main__":
    main()
