"""A whole run as a function call: what `streamsyn run` does."""

import streamsyn

SEEDS = [
    {"task": "lighthouses", "instruction": "Who kept the light at Skomvaer?", "answer": "Ada Berg kept it."},
    {
        "task": "lighthouses",
        "instruction": "When was the lamp replaced?",
        "answer": "It was replaced in 1910.",
    },
    {"task": "lighthouses", "instruction": "What did the keeper log?", "answer": "Wind, ships and oil."},
]


def main() -> None:
    """Write a context for each seed. Run it again to resume, or to see that nothing is left to do."""
    summary = streamsyn.run_sync(
        out="runs/script",
        seeds=SEEDS,  # or "pairs.jsonl", or any iterable of dicts
        servers=["http://127.0.0.1:30000"],
        overrides={"recipe.target_words": 300, "assembly.contexts_per_sample": 2},
    )
    print(f"{summary.contexts} contexts and {summary.samples} samples in {summary.out}")


if __name__ == "__main__":
    main()
