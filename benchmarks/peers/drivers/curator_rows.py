"""bespokelabs-curator: its online processor with a local base URL; resumes from its cache folder."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from common import MAX_TOKENS, parse, report

JOB = parse()
os.environ.update(
    CURATOR_DISABLE_RICH_DISPLAY="1",
    TELEMETRY_ENABLED="0",
    CURATOR_CACHE_DIR=str(JOB.out / "cache"),
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    OPENAI_API_KEY="none",
    HF_HUB_OFFLINE="1",
)
_found = importlib.util.find_spec("litellm")
assert _found is not None
assert _found.origin is not None
# It needs a vocabulary from the internet; litellm carries a copy.
for _folder in ("litellm_core_utils/tokenizers", "llms/tokenizers"):
    if (Path(_found.origin).parent / _folder).is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(_found.origin).parent / _folder)

from bespokelabs import curator
from datasets import Dataset


class Writer(curator.LLM):
    """Asks for one row."""

    def prompt(self, row: dict[str, Any]) -> str:
        """Its prompt."""
        return row["prompt"]

    def parse(self, row: dict[str, Any], response: str) -> dict[str, Any]:
        """The row that is written."""
        return {"prompt": row["prompt"], "text": response}


def main() -> None:
    writer = Writer(
        model_name="gpt-4",  # a name whose vocabulary it knows; the server answers to any
        backend="openai",
        backend_params={
            "base_url": f"{JOB.url}/v1",
            "max_concurrent_requests": JOB.concurrency,
            "max_requests_per_minute": 10_000_000,
            "max_tokens_per_minute": 10_000_000_000,
            "max_retries": 10,
        },
        generation_params={"max_tokens": MAX_TOKENS},
    )
    result = writer(Dataset.from_dict({"prompt": list(JOB.texts())}))
    report(JOB, list(result.dataset["prompt"]))


if __name__ == "__main__":
    main()
