"""All errors that streamsyn raises on purpose, grouped by what the caller does next.

    StreamsynError
    ├── ConfigError            the user has to fix something: names the key or the file, exit 2
    │   ├── DirectoryInUse     another process holds the run directory
    │   ├── InboxClosed        seeds were submitted to a run that takes no more
    │   ├── KeyInUse           a request with the same idempotency key has not ended yet: wait and try again
    │   └── KeyReused          the idempotency key belongs to a request with a different content
    ├── StoppedEarly           resumable: exit 75
    │   ├── FleetGone          no server was usable for `fleet.give_up_s`
    │   └── ReaderGone         the reader of stdout closed the pipe
    ├── TakenOver              a newer process writes to the run directory: nothing to do here; exit 75
    ├── TooManyRejects         rejects exceed `run.max_reject_fraction`: mend the cause, then resume; exit 3
    ├── ServerError            one attempt of a request failed
    │   ├── ServerUnavailable  connection lost, 5xx: try another server
    │   │   ├── ServerUnreachable  no connection could be made: the request was never sent
    │   │   └── WrongAddress       not the URL of an API; a mistake if no server answers at the start
    │   ├── ServerBusy         queue full: wait and try again; not a failure (backpressure)
    │   │   └── RateLimited    429: the server, or this request alone, has to wait
    │   ├── ServerTimeout      no answer in time: abort by request id, try again
    │   ├── BrokenResponse     an invalid answer: try again, then reject
    │   └── RequestRefused     any other 4xx: reject, never retried
    ├── LaunchError            a server started for this run did not come up
    ├── SinkError              the log cannot be written (disk full, I/O error): stops the run
    │   ├── RunReplaced        a different run is in the place of the one that was followed
    │   └── RowsRemoved        retention has removed the rows that were asked for
    └── TrainingFailed         a training failed and would fail again

Errors of libraries are translated to one of these once, where the library is called.
"""

from streamsyn.plain_text import message, without_userinfo


class StreamsynError(Exception):
    """Base class. The text is one line for the user, and has no passwords of URLs."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_userinfo(message))


class ConfigError(StreamsynError):
    """Raised when a key, an option or a file of the user is invalid; the text names it."""


class DirectoryInUse(ConfigError):
    """Raised when another process is writing to the run directory."""


class InboxClosed(ConfigError):
    """Raised when seeds are submitted to a run whose inbox is closed."""


class KeyInUse(ConfigError):
    """Raised when a request with the same idempotency key is still being received."""


class KeyReused(ConfigError):
    """Raised when a request has the idempotency key of an earlier one with a different content."""


class StoppedEarly(StreamsynError):
    """Raised when a run cannot continue now but can be resumed."""


class FleetGone(StoppedEarly):
    """Raised when every server has been unusable for `fleet.give_up_s`."""


class ReaderGone(StoppedEarly):
    """Raised when the reader of stdout closed the pipe."""


class TakenOver(StreamsynError):
    """Raised when a newer process has taken over the run directory: this one must not write any more."""


class TooManyRejects(StreamsynError):
    """Raised when rejects exceed `run.max_reject_fraction`, or the first outcomes all failed in one way."""


class ServerError(StreamsynError):
    """Raised when one attempt at one server gave no usable answer.

    Its text may quote the server: it is one line of at most 2 KB, without control characters.

    Attributes:
        completion_tokens: Tokens that the server reported as written before the failure; they are lost.
    """

    def __init__(self, text: str, completion_tokens: int = 0) -> None:
        super().__init__(message(text))
        self.completion_tokens = completion_tokens


class ServerUnavailable(ServerError):
    """Raised when the server could not be reached, lost the connection before the end of an answer, or
    answered 5xx.
    """


class ServerUnreachable(ServerUnavailable):
    """Raised when no connection to the server could be made, so the request was not sent."""


class WrongAddress(ServerUnavailable):
    """Raised when the URL is not that of an OpenAI-compatible API: it redirects, or has no /v1/models."""


class ServerBusy(ServerError):
    """Raised when the server's queue is full; the request itself is fine."""


class RateLimited(ServerBusy):
    """Raised when the server answers 429, or asks for a pause with 503 and `Retry-After`.

    Attributes:
        retry_after_s: The pause in seconds that the server asks for; None if it does not.
    """

    def __init__(self, message: str, completion_tokens: int = 0, retry_after_s: float | None = None) -> None:
        super().__init__(message, completion_tokens)
        self.retry_after_s = retry_after_s


class ServerTimeout(ServerError):
    """Raised when no answer came within `fleet.request_timeout_s`."""


class BrokenResponse(ServerError):
    """Raised when a complete answer is invalid JSON, lacks a field or was aborted."""


class RequestRefused(ServerError):
    """Raised when the server refuses the request as invalid; a retry cannot help."""


class LaunchError(StreamsynError):
    """Raised when a server started for this run did not come up."""


class SinkError(StreamsynError):
    """Raised when the log cannot be written; what is on disk stays valid and resumable."""


class RunReplaced(SinkError):
    """Raised when the run that is followed was deleted and a different one begun in its place."""


class RowsRemoved(SinkError):
    """Raised when rows are asked for that retention has removed; the mirror has them.

    Attributes:
        first_seq: The `seq` of the first row that is left.
    """

    def __init__(self, message: str, first_seq: int) -> None:
        super().__init__(message)
        self.first_seq = first_seq


class TrainingFailed(StreamsynError):
    """Raised when a training diverged or had nothing to train on; earlier checkpoints stay valid."""


def root_cause(error: BaseException) -> BaseException:
    """Return the one error to report of a group of asyncio tasks that failed together.

    Bugs come first, then other StreamsynErrors, then ConfigError, then StoppedEarly.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    order = (StoppedEarly, ConfigError, StreamsynError)
    causes = [root_cause(part) for part in error.exceptions]
    return max(
        causes, key=lambda cause: next((n for n, kind in enumerate(order) if isinstance(cause, kind)), 9)
    )
