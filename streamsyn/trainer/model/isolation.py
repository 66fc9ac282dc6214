"""The packing isolation check: whether a model keeps the samples of a row apart, found out before training.

A model may ignore the boundaries, the positions or the choice of logits: it has a recurrent state, its own
attention, or masks that only transformers builds. Nothing would fail; training would be silently wrong.
Therefore the model is called with a packed row, and its logits are compared with those of its own eager
attention for each sample alone. If they differ, each sample gets a row of its own, checked in the same way.

Real models attend within windows of thousands of tokens, and some change their rotary frequencies when a row
exceeds the original length. Eager attention at such lengths would need T x T scores of all heads. So two
short samples stand for long ones, on the model itself, with its weights, kernels and precision:

- Windows below `train.seq_len` are `_WINDOW` tokens long during the check, in the model's configurations and
  modules, where transformers' masks and attention functions read them. A limit of a name that `_LIMIT` does
  not know would not be seen; `tests/trainer/architectures.py` compares 70 architectures without this.
- The first sample ends at the last position that `train.seq_len` allows. Frequencies depend on the highest
  position of a row, not on its number of tokens, so any threshold is exceeded as by a full row.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy
import structlog
import torch
from transformers import PreTrainedConfig

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.examples import Example, Key
from streamsyn.trainer.model.attention import MASKED
from streamsyn.trainer.model.loss import make_batch

log = structlog.get_logger()

_WINDOW = 16
_LENGTHS = (70, 8)
"""Several windows, so that most tokens have others that they must not see; and shorter than any original
rotary length."""
_LIMIT = re.compile(r"window|chunk|topk|floor_scale|local_attention")
"""Names of limits in tokens: sliding windows, chunks, the tokens that sparse attention chooses."""
_SINGLE, _HALF = 1e-4, 5e-2
"""Largest relative difference from eager attention in float32 and in bf16: kernels differ in rounding."""
_ROUNDING = 3
"""In bf16 a deep model may differ by that many times more, if tokens within the first window do so too: these
see the same tokens with any mask."""
_SAME, _SAME_HALF = 1e-5, 1e-3
"""Largest relative difference between calls of the same shapes, which should be none. What a model sees of
another sample can change its logits by less than kernels of different shapes differ in bf16."""
_EAGER_UP_TO = 8192
"""Eager attention holds T x T scores of all heads: 8 GiB a layer for 8,192 tokens and 32 heads."""


def choose_packing(
    model: Any, plain: Any, device: torch.device, section: TrainSection, *, half: bool
) -> bool:
    """Return whether rows hold several samples; otherwise each sample gets a row of its own.

    Sets the attention of the model: the one that it was read with, or else one that builds the model's own
    masks. A collective: all ranks call it, and decide alike.

    Args:
        model: The callable, as in `Placed`.
        plain: The model of transformers or peft itself.
        device: Where it runs.
        section: `train`.
        half: Whether it runs in bf16.

    Raises:
        ConfigError: The model cannot be trained; the message says why.
    """
    check = _Check(model, plain.config, device, section.seq_len, half)
    ours = plain.config._attn_implementation  # noqa: SLF001 - transformers has no public name for it
    ways = [(True, ours)] * (section.packing == "auto") + [(False, ours)]
    if section.sequence_parallel == 1:  # ranks that share rows need our attention
        ways += [(False, MASKED)] + [(False, "eager")] * (section.seq_len <= _EAGER_UP_TO)
    problems: list[str] = []
    with _evaluated(model), _short_windows(model, section.seq_len):
        expected = check.expected()
        for packs, attention in ways:
            problem = check.problem(expected, attention, packs=packs)
            if problem is None:
                if not packs:
                    _report(section, attention, problems)
                return packs
            problems.append(problem)
    raise ConfigError(f"the model cannot be trained: {problems[0]}")


def _report(section: TrainSection, attention: str, problems: Sequence[str]) -> None:
    """Log that each sample gets a row of its own, and why.

    Raises:
        ConfigError: The loss is one of packed rows.
    """
    why = problems[0] if problems else 'train.packing is "none"'
    if section.loss == "longwriter":
        raise ConfigError(
            f"train.loss: longwriter weighs samples by the row that they are packed into, but rows hold one "
            f"sample: {why}; use sequence or token"
        )
    log.info(
        "train.packing",
        packing="none",
        attention=attention.removeprefix("streamsyn_"),
        why=f"one sample a row: {why}",
    )


@dataclass(frozen=True, slots=True)
class _Check:
    """Calls the model with short samples."""

    model: Any
    config: Any
    device: torch.device
    seq_len: int
    half: bool

    def expected(self) -> list[torch.Tensor]:
        """The logits of each sample's targets, alone, by the model's own eager attention.

        It is called as transformers documents it, with nothing of ours.

        Raises:
            ConfigError: They are not finite, or the model cannot be called.
        """
        self.config._attn_implementation = "eager"  # noqa: SLF001 - as above
        found = []
        for sample, far in zip(self._samples(), (True, False), strict=True):
            ids = torch.from_numpy(sample.tokens).long()[None].to(self.device)
            logits = self._call(
                input_ids=ids, position_ids=self._positions([sample], far=far), use_cache=False
            )
            found.append(logits[sample.loss_from - 1 : -1])
        if not all(one.isfinite().all() for one in found):
            raise ConfigError(
                "the model's logits are not finite: its weights hold NaN or infinity, or overflow"
            )
        return found

    def problem(self, expected: Sequence[torch.Tensor], attention: str, *, packs: bool) -> str | None:
        """Why the model cannot be trained with an attention, packed or one sample a row; None if it can."""
        self.config._attn_implementation = attention  # noqa: SLF001 - as above
        rows = [self._samples()] if packs else [(one,) for one in self._samples()]
        try:
            found = [self._logits(row, far=number == 0) for number, row in enumerate(rows)]
            if list(map(len, found)) != [sum(one.target_tokens for one in row) for row in rows]:
                return "it does not return the logits of chosen positions (logits_to_keep)"
            leak = self._leak_in_row(found[0]) if packs else self._leak_of_later_tokens(found[0])
        except ConfigError as error:
            return str(error)
        parts = torch.cat(found).split([len(one) for one in expected])
        if leak is None and not all(map(self._is_near, parts, expected)):
            differ = max(map(_difference, parts, expected))
            return f"its logits differ by {differ:.2g} of their norm from those of its own eager attention"
        return leak

    def _is_near(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether the logits of a sample are those of eager attention, up to rounding."""
        early = _difference(found[: _WINDOW - 1], expected[: _WINDOW - 1])
        late = _difference(found, expected)
        if not self.half:
            return late <= _SINGLE
        return early <= _ROUNDING * _HALF and late <= max(_HALF, _ROUNDING * early)

    def _leak_in_row(self, base: torch.Tensor) -> str | None:
        """Whether the second sample of a row depends on the tokens of the first, or on its positions."""
        first, second = self._samples()
        count = second.target_tokens
        other = self._logits((_sample(2, first.length), second), far=True)
        if not self._same(other[-count:], base[-count:]):
            return "a sample's logits depend on the sample before it in its row"
        near = self._logits((first, second), far=None)
        if not self._same(near[-count:], base[-count:]):
            return "a sample's logits depend on the longest sample of its row (rotary frequencies)"
        return None

    def _leak_of_later_tokens(self, base: torch.Tensor) -> str | None:
        """Whether the first half of a sample depends on its other half."""
        first = self._samples()[0]
        half = first.length // 2
        tokens = first.tokens.copy()
        tokens[half:] = tokens[half:][::-1]
        other = self._logits((replace(first, tokens=tokens),), far=True)
        return (
            None
            if self._same(other[: half - 1], base[: half - 1])
            else "its tokens see later ones (not causal)"
        )

    def _same(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        return _difference(found, expected) <= (_SAME_HALF if self.half else _SAME)

    def _samples(self) -> tuple[Example, Example]:
        first, second = (_sample(at, min(length, self.seq_len)) for at, length in enumerate(_LENGTHS))
        return first, second

    def _positions(self, samples: Sequence[Example], *, far: bool | None) -> torch.Tensor:
        """The positions of a row. The first sample ends at the last one that there may be (`far`), or all of
        it stands at position 0 (None).
        """
        ranges = [torch.arange(one.length) for one in samples]
        if far is None:
            ranges[0].zero_()
        elif far:
            ranges[0] += self.seq_len - samples[0].length
        return torch.cat(ranges)[None].to(self.device)

    def _logits(self, row: Sequence[Example], *, far: bool | None) -> torch.Tensor:
        batch = make_batch(tuple(row), [1.0] * len(row), self.device)
        return self._call(**replace(batch, position_ids=self._positions(row, far=far)).forward_arguments())

    def _call(self, **arguments: Any) -> torch.Tensor:
        """The logits of a row.

        Raises:
            ConfigError: The call fails, whatever the model raises.
        """
        try:
            logits: torch.Tensor = self.model(**arguments).logits[0].float()
        except (ConfigError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            text = next(iter(str(error).splitlines()), "")
            raise ConfigError(f"calling it raises {type(error).__name__}: {text}") from error
        return logits


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative difference of logits; NaN if some are not finite."""
    return float((found - expected).norm() / expected.norm())


def _sample(number: int, length: int) -> Example:
    """Tokens that any vocabulary has; all but the first are targets."""
    tokens = (numpy.arange(length, dtype=numpy.int32) * (7 + 4 * number) + 3) % 61
    return Example(Key("isolation", 0, number), "", "", tokens, 1)


@contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


@contextmanager
def _short_windows(model: Any, seq_len: int) -> Iterator[None]:
    """Inside this context, limits that rows can exceed are `_WINDOW` tokens."""
    changed: list[tuple[Any, str, int]] = []
    owners = {id(owner): owner for module in model.modules() for owner in _owners(module)}
    try:
        for owner in owners.values():
            for name, value in list(vars(owner).items()):
                if type(value) is int and _WINDOW < value < seq_len and _LIMIT.search(name):
                    changed.append((owner, name, value))
                    setattr(owner, name, _WINDOW)
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _owners(module: torch.nn.Module) -> list[Any]:
    config = getattr(module, "config", None)
    return [module, config, config.get_text_config()] if isinstance(config, PreTrainedConfig) else [module]
