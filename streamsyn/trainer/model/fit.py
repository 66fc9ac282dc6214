"""Whether a tokenizer, a model and `train.seq_len` go together: asked before any weight is read."""

from typing import Any

import structlog
from transformers import AutoConfig, PreTrainedTokenizerBase

from streamsyn.errors import ConfigError

log = structlog.get_logger()

_ROTARY = ("rope_theta", "rope_parameters", "rope_scaling")


def check_fit(path: str, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
    """See whether the model has an embedding for each token, and a position for each place in a row.

    A model with rotary positions goes on beyond those it knows, more or less well: that is said, no more.

    Raises:
        ConfigError: It has not.
    """
    config = AutoConfig.from_pretrained(path).get_text_config()
    highest = max(tokenizer.get_vocab().values(), default=-1)
    embeddings = getattr(config, "vocab_size", None)
    if isinstance(embeddings, int) and highest >= embeddings:
        raise ConfigError(
            f"--model {path}: its tokenizer has token {highest}, and the model embeddings for {embeddings} "
            f"tokens: they do not belong together"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions >= seq_len:
        return
    if not _is_rotary(config):
        raise ConfigError(f"train.seq_len: {seq_len} tokens, and --model {path} has {positions} positions")
    log.warning(
        "train.beyond_positions",
        seq_len=seq_len,
        known_positions=positions,
        why="what lies beyond is extrapolated: set rope scaling in its config.json, or a lower train.seq_len",
    )


def _is_rotary(config: Any) -> bool:
    return any(getattr(config, name, None) is not None for name in _ROTARY)
