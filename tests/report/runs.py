"""Run directories for the tests of the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamsyn.config.loading import load
from streamsyn.records import Context, Reject, RejectReason, Sample
from streamsyn.sink.rundir import RunDirectory
from tests import builders

HOSTILE = (
    '</div></details></section><script>document.title = "owned"; console.error("owned")</script>'
    '<img src=x onerror="document.title=1"><style>body{display:none}</style>'
    '<iframe src="http://elsewhere.test/"></iframe>{{ 7 * 7 }}{% raw %} &amp; &lt; ]]> --> " \' ` '
    "\x00 \x01 \x1b[31m \x7f \x85 \u202e reversed \u2066 \u2028 \ufeff \ufffe 𝄞 👩‍👩‍👧 " + "longword" * 400
)
"""A text that tries everything a text can do to a page."""


def written(
    root: Path,
    outcomes: Sequence[Context | Reject] = (),
    samples: Sequence[Sample] = (),
    *,
    is_final: bool = True,
    **settings: Any,
) -> Path:
    """Write a run directory with outcomes and samples; `settings` are keys of the configuration."""
    config = load(None, list(settings.items()))
    directory = RunDirectory(root)
    directory.save(config.model_dump(mode="json"), {})
    directory.close()
    with builders.opened(root, builders.sink(shard_bytes=20_000)) as log:
        for outcome in outcomes:
            log.append([outcome])
        if samples:
            log.samples.append(samples)
        if is_final:
            log.seal_outcomes()
            log.finish()
    return root


def scored(
    number: int, gain: float = 0.8, score: float = 0.9, closed_book: float = 0.1, **given: Any
) -> Context:
    """A context with all scores."""
    flags = [] if gain >= 0 else ["low_context_gain"]
    flags += [] if score >= 0.1 else ["not_answerable"]
    flags += given.pop("flags", [])
    checks = {
        "words": 1900,
        "flags": flags,
        "context_gain": gain,
        "answer_metric": "f1",
        "answer_score": score,
        "closed_book_score": closed_book,
        "model_answer": "so it says",
        "closed_book_answer": "no idea",
        "scoring": {"prompt_tokens": 300, "cached_tokens": 200, "completion_tokens": 9},
        **given.pop("checks", {}),
    }
    return builders.context(number, checks=checks, written_at=1000.0 + number, **given)


def rejected(number: int, reason: RejectReason = RejectReason.REFUSAL, **given: Any) -> Reject:
    """A reject of a seed."""
    fields: dict[str, Any] = {
        "key": b"reject %09d" % number,
        "reason": reason,
        "detail": f"detail {number}",
        "origin": f"seeds.jsonl:{number}",
        "id": f"rejected-{number}",
        "seed_id": f"rejected-{number}",
        "draft": 0,
        "task": "qa",
        "instruction": f"Why {number}?",
        "answer": "Because.",
        "written_at": 1000.0 + number,
    }
    return Reject(**{**fields, **given})


def sample_of(context: Context, seq: int, others: Sequence[str] = ()) -> Sample:
    """A sample whose last passage is the context."""
    texts = [*others, context.context]
    return Sample(
        id=context.id,
        seed_id=context.seed_id,
        task=context.task,
        instruction=context.instruction,
        messages=[
            {"role": "user", "content": "Read.\n\n" + "\n\n".join(texts) + f"\n\nNow: {context.instruction}"},
            {"role": "assistant", "content": context.answer},
        ],
        context_seqs=[seq] * len(texts),
        relevant_index=len(others),
        n_tokens=100 * len(texts),
    )


def good_run(root: Path, number: int = 240, **settings: Any) -> Path:
    """A run whose facts are all good."""
    contexts = [scored(one, task=("qa", "summary")[one % 2]) for one in range(number)]
    samples = [sample_of(context, seq, ["other"] * 9) for seq, context in enumerate(contexts)]
    measured = {
        "checks.context_gain": True,
        "checks.answerable": True,
        "checks.near_duplicate": "flag",
        "checks.eval_sets": ["eval.jsonl"],
    }
    return written(root, [*contexts, rejected(1)], samples, **{**measured, **settings})
