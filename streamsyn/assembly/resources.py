"""The user message of a sample: a template for each family of tasks, or the user's own.

What assembly needs besides contexts, loaded once: prompts, tokenizer, corpus.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamsyn.assembly.assembler import Assembler
from streamsyn.assembly.corpus import Corpus, load_corpus
from streamsyn.assembly.sample_prompts import SamplePrompts
from streamsyn.assembly.token_counter import TokenCounter
from streamsyn.config.sections import AssemblySection
from streamsyn.errors import ConfigError
from streamsyn.records import digest

if TYPE_CHECKING:
    from streamsyn.assembly.chat_tokenizer import ChatTokenizer


class ResourceMissing(ConfigError):
    """A tokenizer or corpus that is not (or no longer) to be had."""


class AssemblyResources:
    """What samples are made with. Any number of assemblers may be made of it.

    Raises:
        ConfigError: Something that the configuration names cannot be used.
        MaterialGone: This is so of its tokenizer or its corpus.
    """

    def __init__(self, section: AssemblySection) -> None:
        self._section = section
        self._prompts = SamplePrompts(section)
        self._tokenizer: ChatTokenizer | None = None
        self._corpus: Corpus | None = None
        try:
            if section.tokenizer is not None:
                from streamsyn.assembly.chat_tokenizer import load_tokenizer

                self._tokenizer = load_tokenizer(section.tokenizer)
            if "corpus" in section.source_weights:
                self._corpus = load_corpus(section)
        except ConfigError as error:
            raise ResourceMissing(str(error)) from error

    def assembler(self, run_seed: int) -> Assembler:
        """One that has not seen a context yet."""
        measure: TokenCounter | None = None
        if self._tokenizer is not None:
            from streamsyn.assembly.token_counter import ChatTokenCounter

            measure = ChatTokenCounter(self._tokenizer, self._prompts)
        return Assembler(self._section, run_seed, self._prompts, measure, self._corpus)

    def fingerprint(self) -> dict[str, str]:
        """What shapes samples besides the configuration: packaged templates, what files hold."""
        shaping = self._prompts.fingerprint()
        if self._tokenizer is not None:
            shaping["assembly.tokenizer"] = self._tokenizer.digest
        if self._corpus is not None:
            shaping["assembly.corpus"] = self._corpus.digest
        return shaping


def with_templates(section: AssemblySection, shaping: Mapping[str, Any], folder: Path) -> AssemblySection:
    """The section with the texts of its templates as files in `folder`: as a run's fingerprint has them."""

    def kept(key: str, path: Path | None) -> Path | None:
        text = shaping.get(key)
        if path is None or not isinstance(text, str):
            return path
        copy = folder / digest(key).hex()
        copy.write_bytes(text.encode())  # not `write_text`, which may change line ends
        return copy

    tasks = {
        name: task.model_copy(update={"template": kept(f"assembly.tasks.{name}.template", task.template)})
        for name, task in section.tasks.items()
    }
    return section.model_copy(
        update={"template": kept("assembly.template", section.template), "tasks": tasks}
    )
