"""Counts samples as the model to be tuned sees them."""

from collections.abc import Sequence

from streamsyn.assembly.passages import Passage, Piece
from streamsyn.assembly.prompts import SamplePrompts
from streamsyn.assembly.splice import Splicer
from streamsyn.assembly.tokens import ChatTokenizer
from streamsyn.templates import PromptTemplate

_SLACK = (32, 2)
"""By how many tokens a sum of passages may be off, and by how many more for each: a guess, which decides
only how early samples are counted exactly."""


class ChatCounts:
    """Counts the whole chat, exactly, and most of it only once for each passage."""

    def __init__(self, tokenizer: ChatTokenizer, prompts: SamplePrompts) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._splicer = Splicer(tokenizer)
        self._between: dict[PromptTemplate, int] = {}

    def about(self, relevant: Passage, piece: Piece) -> int:
        template = self._prompts.template(relevant.task)
        if template not in self._between:
            self._between[template] = self._glue(template)
        return self._splicer.alone(piece) + self._between[template]

    def slack(self, pieces: int) -> int:
        always, each = _SLACK
        return always + each * pieces

    def total(self, relevant: Passage, pieces: Sequence[Piece], user: str | None = None) -> int:
        if user is None:
            user = self._prompts.user_message(relevant, [piece.text for piece in pieces])
        return self._splicer.count(self._tokenizer.render(user, relevant.answer), pieces)

    def _glue(self, template: PromptTemplate) -> int:
        """Tokens of what the template puts round a passage."""
        one, three = (
            self._tokenizer.count(template.render(contexts=["word"] * n, instruction="word", task="word"))
            for n in (1, 3)
        )
        return (three - one) // 2 - self._tokenizer.count("word")
