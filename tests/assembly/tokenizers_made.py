"""Small tokenizers, made by the library itself, of every kind that is counted incrementally or whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from streamsyn.assembly.chat_tokenizer import ChatTokenizer

CHAT = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] | trim }}</s>\n{% endfor %}"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(*, use_regex: bool, add_prefix_space: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def _split(*patterns: str) -> Any:
    levels = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*levels, _bytes(use_regex=False)])


SUPPORTED: dict[str, Any] = {
    "gpt2": _bytes(use_regex=True),
    "llama3": _split(LLAMA3),
    "qwen2": _split(QWEN2),
    "o200k": _split(O200K),
    "deepseek": _split(r"\p{N}{1,3}", "[一-龥\u3040-ゟ\u30a0-ヿ]+", DEEPSEEK),
    "starcoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _bytes(use_regex=True)]),
    "whitespace": pre_tokenizers.Whitespace(),
    "words": pre_tokenizers.WhitespaceSplit(),
    "bert": pre_tokenizers.BertPreTokenizer(),
    "lines": pre_tokenizers.Split("\n", "merged_with_previous"),
    "spaces": pre_tokenizers.Split(" ", "merged_with_next"),
    "sentences": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[a-z ]+\."), "isolated"), pre_tokenizers.Split(" ", "isolated")]
    ),
    "looks ahead": _split(r"ab(?=[.1]{6})|\s+|."),
    "fours": _split(r"[ab]{4}", r"[ab]{1,3}|\s+"),
    "metaspace": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "metaspace never": pre_tokenizers.Metaspace(prepend_scheme="never"),
}
UNSUPPORTED: dict[str, Any] = {
    "metaspace first": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "metaspace unsplit": pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
    "prefix space": _bytes(use_regex=True, add_prefix_space=True),
    "looks back": _split(r"(?<=a)b|\s+"),
    "word edge": _split(r"\bab?|\s+"),
    "groups": _split(r"(?:ab ?)+|\s+"),
    "digits in threes": _split(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", r"\s+"),
    "none": None,
}


def made(
    pre_tokenizer: Any,
    corpus: Sequence[str],
    *,
    vocabulary: int = 400,
    added: Sequence[AddedToken] = (),
    nfc: bool = False,
    model: str = "bpe",
    alphabet: bool = True,
) -> ChatTokenizer:
    """A tokenizer trained on `corpus`, with `<s>` and `</s>` round each message."""
    special = [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE())
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        )
    elif model == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocabulary, special_tokens=["<unk>", *special], show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=vocabulary,
            special_tokens=["<unk>", *special],
            unk_token="<unk>",
            show_progress=False,
        )
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(list(added))
    return ChatTokenizer("made", json.loads(tokenizer.to_str()), CHAT, {"bos_token": "<s>"})


def save(folder: Path, tokenizer: ChatTokenizer, **config: Any) -> Path:
    """Save the files of a tokenizer as a model's folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.spec), "utf-8")
    saved = {"bos_token": "<s>", "chat_template": CHAT, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(saved), "utf-8")
    return folder
