"""The prompts, tokenizer and corpus of a configuration, loaded before a run begins.

The code that makes samples is imported when an assembler is needed: it is slow to import, and the first
requests of a run are sent before that.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from streamsyn.assembly.sample_prompts import SamplePrompts
from streamsyn.config.sections import AssemblySection, RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.records import digest

if TYPE_CHECKING:
    from streamsyn.assembly.assembler import Arrangement, Assembler
    from streamsyn.assembly.chat_tokenizer import ChatTokenizer
    from streamsyn.assembly.corpus import Corpus
    from streamsyn.assembly.token_counter import TokenCounter
    from streamsyn.assembly.window import Passage

Templated = TypeVar("Templated", AssemblySection, RecipeSection)


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
                from streamsyn.assembly.corpus import load_corpus

                self._corpus = load_corpus(section)
        except ConfigError as error:
            raise ResourceMissing(str(error)) from error

    def arrangement(
        self,
        passages: "Sequence[Passage | int]",
        relevant_index: int,
        target_tokens: int | None,
        n_tokens: int,
    ) -> "Arrangement":
        """Return a sample that was chosen before. A number is the index of a passage of the corpus."""
        from streamsyn.assembly.assembler import Arrangement
        from streamsyn.assembly.token_counter import ServerTokenCounter

        corpus = self._corpus or ()
        pieces = [corpus[one] if isinstance(one, int) else one for one in passages]
        counter = ServerTokenCounter()  # not needed: the tokens have been counted
        return Arrangement(pieces, relevant_index, target_tokens, n_tokens, self._prompts, counter)

    def assembler(self, run_seed: int) -> "Assembler":
        """Return a new assembler."""
        from streamsyn.assembly.assembler import Assembler

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


def with_templates(section: Templated, name: str, fingerprint: Mapping[str, Any], folder: Path) -> Templated:
    """Return the section with its templates as the run's fingerprint has them, saved as files in `folder`.

    Args:
        section: The section.
        name: Its name in the configuration.
        fingerprint: The fingerprint in run.json.
        folder: Where the files go.
    """

    def saved(key: str, path: Path | None) -> Path | None:
        text = fingerprint.get(key)
        if path is None or not isinstance(text, str):
            return path
        copy = folder / digest(key).hex()
        copy.write_bytes(text.encode())  # `write_text` may change line ends
        return copy

    tasks = {
        key: task.model_copy(update={"template": saved(f"{name}.tasks.{key}.template", task.template)})
        for key, task in section.tasks.items()
    }
    return section.model_copy(
        update={"template": saved(f"{name}.template", section.template), "tasks": tasks}
    )
