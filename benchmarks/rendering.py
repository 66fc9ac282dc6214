"""How many tokens a CPU second the trainer makes of samples, on one core.

    python -m benchmarks.rendering MODEL SAMPLES [--rounds 7] [--limit 256]

MODEL is a directory with a tokenizer and its chat template, SAMPLES a file of samples (JSON lines, as `run`
and `export` write them). Beside it: the same with each prompt tokenized twice, alone and with its answer, as
streamsyn did before. Rounds are interleaved; the medians count.
"""

import argparse
import os
import time
from itertools import islice
from pathlib import Path
from statistics import median

import orjson

from streamsyn.trainer.examples import Example, Key
from streamsyn.trainer.model.pretrained import read_tokenizer
from streamsyn.trainer.stream.render import Renderer


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("samples", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=int, default=256, help="samples: the first ones")
    given = parser.parse_args()
    with given.samples.open("rb") as file:
        rows = [
            (orjson.loads(line), Key("run", 0, seq)) for seq, line in enumerate(islice(file, given.limit))
        ]
    ways = {"prompt once": Renderer(read_tokenizer(given.model, None), 10**9, "drop")}
    ways["prompt twice"] = Renderer(read_tokenizer(given.model, None), 10**9, "drop")
    ways["prompt twice"].last_special = None
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(given.rounds):
        for way, renderer in ways.items():
            began = time.process_time()
            made = renderer.render_batch(rows)
            took = time.process_time() - began
            tokens = sum(one.length for one in made if isinstance(one, Example))
            rates[way].append(tokens / took)
    print(f"{len(rows)} samples, {tokens} tokens")
    for way, found in rates.items():
        print(f"{way}: {median(found):,.0f} tokens a CPU second ({min(found):,.0f} to {max(found):,.0f})")


if __name__ == "__main__":
    main()
