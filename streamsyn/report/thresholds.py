"""From where on each fact of a run is good, worth a look, or bad. Shares, where nothing else is said."""

from typing import Final

FEW_CONTEXTS: Final = 200
"""Fewer deserve a closer look: arXiv 2502.15592 trains on 200 seeds of each of its tasks."""
REJECTS_LOOK: Final = 0.05
REJECTS_BAD: Final = 0.20
"""Rejects are no even draw of the seeds: beyond a fifth the mix that is trained on is another one."""
POSITIVE_GOOD: Final = 0.90
POSITIVE_LOOK: Final = 0.70
"""Share of contexts with a positive gain. Chance gives a half; a fifth of useless contexts is told by 0.9."""
MEDIAN_GAIN_LOOK: Final = 0.05
"""Nats a token; below it the answer is hardly likelier (5 %) with the context than without."""
ANSWERABLE_GOOD: Final = 0.80
ANSWERABLE_LOOK: Final = 0.50
"""Share of contexts from which the answer is found. Strong models miss some that are there."""
KNOWN_LOOK: Final = 0.30
KNOWN_BAD: Final = 0.60
"""Share of answers that are known without the context; where most are, reading it is not what is learnt."""
DUPLICATES_LOOK: Final = 0.01
DUPLICATES_BAD: Final = 0.05
"""Share of near-duplicates that were kept."""
LEAKS_BAD: Final = 0.01
"""Share of contaminated contexts that were kept; a single one deserves a look."""
WORDS_GOOD: Final = 0.7
WORDS_LOOK: Final = 0.4
"""Median words, of those asked for. Models write shorter than they are asked to, commonly by a quarter."""
REACHED_GOOD: Final = 0.95
REACHED_LOOK: Final = 0.80
"""Share of documents and samples that reach the length asked for."""
TRUNCATED_LOOK: Final = 0.05
"""Share of contexts that end in the middle of a sentence: a blemish, no reason not to train."""
