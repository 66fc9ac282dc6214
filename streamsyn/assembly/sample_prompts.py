"""The user message of a sample, rendered with the template of its task's family or with the user's own."""

from typing import TYPE_CHECKING

from streamsyn.config.sections import AssemblySection
from streamsyn.errors import ConfigError
from streamsyn.records import digest
from streamsyn.templates import PromptTemplate, packaged, read

if TYPE_CHECKING:
    from streamsyn.assembly.window import Passage

FAMILIES = ("single_doc_qa", "multi_doc_qa", "summary", "meeting_query", "general")

KNOWN_TASKS = {
    **{family: family for family in FAMILIES},
    # the data sets of LongBench (arXiv 2308.14508) that the paper takes its seeds from
    "narrativeqa": "single_doc_qa",
    "qasper": "single_doc_qa",
    "multifieldqa_en": "single_doc_qa",
    "hotpotqa": "multi_doc_qa",
    "2wikimqa": "multi_doc_qa",
    "2wikiqa": "multi_doc_qa",
    "musique": "multi_doc_qa",
    "govreport": "summary",
    "gov_report": "summary",
    "multinews": "summary",
    "multi_news": "summary",
    "qmsum": "meeting_query",
}
"""The family of each task that is known by name."""

# A single context, as a sample has where no distractor fits.
_EXAMPLE = {"contexts": ["a"], "instruction": "i", "task": "t"}


class SamplePrompts:
    """Renders user messages.

    Raises:
        ConfigError: A family or template that the configuration names cannot be used.
    """

    def __init__(self, section: AssemblySection) -> None:
        self._families = {
            name: PromptTemplate(name, packaged("samples", name), _EXAMPLE) for name in FAMILIES
        }
        self._common: PromptTemplate | None = None
        if section.template is not None:
            self._common = PromptTemplate(str(section.template), read(section.template), _EXAMPLE)
        elif not section.source_weights:
            self._common = self._families["general"]  # a single document needs no introduction
        self._tasks: dict[str, PromptTemplate] = {}
        for task, override in section.tasks.items():
            if override.template is not None:
                path = override.template
                self._tasks[task] = PromptTemplate(str(path), read(path), _EXAMPLE)
            elif override.family is not None:
                if override.family not in FAMILIES:
                    raise ConfigError(
                        f"assembly.tasks.{task}.family: unknown family {override.family!r}; "
                        f"the families are {', '.join(FAMILIES)}"
                    )
                self._tasks[task] = self._families[override.family]

    def user_message(self, passage: "Passage", contexts: list[str]) -> str:
        """Return the message that holds `contexts` and asks the instruction of `passage`."""
        template = self.template(passage.task)
        return template.render(contexts=contexts, instruction=passage.instruction, task=passage.task)

    def template(self, task: str) -> PromptTemplate:
        """Return the template of a task: its own, else the common one, else that of its family."""
        family = self._families[KNOWN_TASKS.get(task.lower(), "general")]
        return self._tasks.get(task) or self._common or family

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of the packaged templates, which may differ between versions."""
        sources = [self._families[name].source for name in FAMILIES]
        return {"assembly.prompts": digest(*sources).hex()}
