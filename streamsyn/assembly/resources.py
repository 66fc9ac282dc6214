"""What assembly needs besides contexts, loaded once: prompt templates, the tokenizer and the corpus."""

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
    """Raised when the tokenizer or the corpus cannot be loaded."""


class AssemblyResources:
    """The prompts, tokenizer and corpus of a configuration. Several assemblers can share them.

    Raises:
        ConfigError: A prompt template cannot be used.
        ResourceMissing: The tokenizer or the corpus cannot be loaded.
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
        """Return a new assembler."""
        counter: TokenCounter | None = None
        if self._tokenizer is not None:
            from streamsyn.assembly.token_counter import ChatTokenCounter

            counter = ChatTokenCounter(self._tokenizer, self._prompts)
        return Assembler(self._section, run_seed, self._prompts, counter, self._corpus)

    def fingerprint(self) -> dict[str, str]:
        """Return digests of what shapes samples besides the configuration: templates, tokenizer, corpus."""
        digests = self._prompts.fingerprint()
        if self._tokenizer is not None:
            digests["assembly.tokenizer"] = self._tokenizer.digest
        if self._corpus is not None:
            digests["assembly.corpus"] = self._corpus.digest
        return digests


def with_templates(section: AssemblySection, fingerprint: Mapping[str, Any], folder: Path) -> AssemblySection:
    """Return the section with its templates as the run's fingerprint has them, saved as files in `folder`."""

    def saved(key: str, path: Path | None) -> Path | None:
        text = fingerprint.get(key)
        if path is None or not isinstance(text, str):
            return path
        copy = folder / digest(key).hex()
        copy.write_bytes(text.encode())  # `write_text` may change line ends
        return copy

    tasks = {
        name: task.model_copy(update={"template": saved(f"assembly.tasks.{name}.template", task.template)})
        for name, task in section.tasks.items()
    }
    return section.model_copy(
        update={"template": saved("assembly.template", section.template), "tasks": tasks}
    )
