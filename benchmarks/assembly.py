"""Assembly throughput: MB of finished sample lines a second, on one Python thread; a tokenizer has its own.

    python -m benchmarks.assembly [--tokenizer FOLDER] [--target-tokens 128000] [--contexts 400]
    python -m benchmarks.assembly --words 60 --contexts-per-sample 1000 --contexts 1020

Contexts are random sentences and paragraphs with the word frequencies of the Python manual. They are made
before the clock starts; Assembler.prepare, Assembler.add, Arrangement.sample and encode_row are timed,
including the samples that are completed late because the first contexts have to wait for distractors.
"""

import argparse
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pydoc_data.topics import topics

from streamsyn.assembly.resources import AssemblyResources
from streamsyn.assembly.window import Passage
from streamsyn.config.sections import AssemblySection
from streamsyn.sink.log import encode_row

BATCH = 64
"""Contexts that are signed and encoded together, as in a run."""


def passages(number: int, words: int) -> Iterator[Passage]:
    """Yield `number` different contexts of about `words` words each."""
    rng = random.Random(1)
    counts = Counter(re.findall(r"\b[a-z]+\b", " ".join(topics.values())))
    vocabulary, weights = list(counts), list(accumulate(counts.values()))
    for seq in range(number):
        parts: list[str] = []
        remaining = words
        while remaining > 0:
            length = min(remaining, rng.randint(6, 24))
            sentence = " ".join(rng.choices(vocabulary, cum_weights=weights, k=length))
            parts.append(sentence.capitalize() + rng.choice([".", ".", ".", "?", ".\n\n"]))
            remaining -= length
        text = " ".join(parts).replace("\n ", "\n")
        answer = " ".join(rng.choices(vocabulary, k=4))
        yield Passage(seq, f"s{seq}", f"s{seq}", "qa", "Who kept the light?", answer, text, 4 * words // 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer",
        help="folder or Hugging Face Hub name; default: use the servers' token counts",
    )
    parser.add_argument("--target-tokens", type=int, default=128_000, help="tokens a sample")
    parser.add_argument("--contexts-per-sample", type=int, help="replaces --target-tokens")
    parser.add_argument("--contexts", type=int, default=400, help="contexts to assemble")
    parser.add_argument("--words", type=int, default=1750, help="words a context")
    parser.add_argument("--corpus", help="draw half of the distractors from this file")
    args = parser.parse_args()
    length = (
        {"target_tokens": args.target_tokens}
        if args.contexts_per_sample is None
        else {"contexts_per_sample": args.contexts_per_sample}
    )
    distractors = (
        {"distractors": {"same_task": 1, "corpus": 1}, "corpus": [args.corpus]} if args.corpus else {}
    )
    section = AssemblySection.model_validate(
        {"tokenizer": args.tokenizer, "window_bytes": 2**30, **length, **distractors}
    )
    resources = AssemblyResources(section)
    assembler = resources.assembler(run_seed=0)
    contexts = list(passages(args.contexts, args.words))
    size = samples = tokens = 0
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    for first in range(0, len(contexts), BATCH):
        batch = contexts[first : first + BATCH]
        assembler.prepare(batch)
        for arrangement in (one for passage in batch for one in assembler.add(passage)):
            sample = arrangement.sample()
            size += len(encode_row(samples, sample))
            samples += 1
            tokens += sample.n_tokens
    seconds, cpu = time.perf_counter() - wall_start, time.process_time() - cpu_start
    print(
        f"{samples} samples of {tokens / max(1, samples):,.0f} tokens, {size / 1e6:,.0f} MB in "
        f"{seconds:.1f} s ({cpu:.1f} s of CPU): {size / 1e6 / seconds:,.1f} MB/s "
        f"({size / 1e6 / cpu:,.1f} MB a second of CPU)"
    )


if __name__ == "__main__":
    main()
