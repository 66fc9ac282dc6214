"""How fast samples are put together: MB of finished lines a second, one thread of Python.

python -m benchmarks.assembly [--tokenizer FOLDER] [--target-tokens 128000] [--contexts 400]
python -m benchmarks.assembly --words 60 --contexts-per-sample 1000 --contexts 1020

Contexts are made up: the words of Python's manual as often as they come there, in sentences and paragraphs.
The time is that of Assembler.add, Arrangement.sample and encode_row; contexts are there before. Samples that
the first contexts wait for are made all the same, so their time counts.
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


def passages(number: int, words: int) -> Iterator[Passage]:
    """Contexts of about so many words, each another."""
    chance = random.Random(1)
    counted = Counter(re.findall(r"\b[a-z]+\b", " ".join(topics.values())))
    known, weights = list(counted), list(accumulate(counted.values()))
    for seq in range(number):
        parts: list[str] = []
        left = words
        while left > 0:
            length = min(left, chance.randint(6, 24))
            sentence = " ".join(chance.choices(known, cum_weights=weights, k=length))
            parts.append(sentence.capitalize() + chance.choice([".", ".", ".", "?", ".\n\n"]))
            left -= length
        text = " ".join(parts).replace("\n ", "\n")
        answer = " ".join(chance.choices(known, k=4))
        yield Passage(seq, f"s{seq}", f"s{seq}", "qa", "Who kept the light?", answer, text, 4 * words // 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", help="a folder or a name on the Hugging Face hub; without: by counts")
    parser.add_argument("--target-tokens", type=int, default=128_000)
    parser.add_argument("--contexts-per-sample", type=int, help="in place of a target")
    parser.add_argument("--contexts", type=int, default=400)
    parser.add_argument("--words", type=int, default=1750, help="of a context")
    parser.add_argument("--corpus", help="draw half of the distractors from these files")
    args = parser.parse_args()
    length = (
        {"target_tokens": args.target_tokens}
        if args.contexts_per_sample is None
        else {"contexts_per_sample": args.contexts_per_sample}
    )
    mixed = {"distractors": {"same_task": 1, "corpus": 1}, "corpus": [args.corpus]} if args.corpus else {}
    section = AssemblySection.model_validate(
        {"tokenizer": args.tokenizer, "window_bytes": 2**30, **length, **mixed}
    )
    resources = AssemblyResources(section)
    assembler = resources.assembler(run_seed=0)
    given = list(passages(args.contexts, args.words))
    size = samples = tokens = 0
    started, began_cpu = time.perf_counter(), time.process_time()
    for passage in given:
        for arrangement in assembler.add(passage):
            sample = arrangement.sample()
            size += len(encode_row(samples, sample))
            samples += 1
            tokens += sample.n_tokens
    seconds, cpu = time.perf_counter() - started, time.process_time() - began_cpu
    print(
        f"{samples} samples of {tokens / max(1, samples):,.0f} tokens, {size / 1e6:,.0f} MB in "
        f"{seconds:.1f} s ({cpu:.1f} s of CPU): {size / 1e6 / seconds:,.1f} MB/s "
        f"({size / 1e6 / cpu:,.1f} MB a second of CPU)"
    )


if __name__ == "__main__":
    main()
