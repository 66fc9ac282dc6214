"""Every error streamsyn raises on purpose, split by what the caller does next.

    StreamsynError
    ├── ConfigError            the user's to mend: one line naming the key or the file, exit 2
    │   └── DirectoryInUse     another process holds the run directory
    ├── StoppedEarly           resumable: exit 75
    │   ├── FleetGone          no server answered for `fleet.give_up_s`
    │   └── ReaderGone         whoever read our stdout went away
    ├── ServerError            one request failed; carries the server and what was tried
    │   ├── ServerUnavailable  connection reset, 5xx: try another server
    │   │   └── ServerUnreachable  no connection could be made: the request was never sent
    │   ├── ServerBusy         queue full: backpressure, wait and try again, not a failure
    │   ├── ServerTimeout      no answer in time: abort by rid, try again
    │   ├── BrokenResponse     an answer that makes no sense: try again, then reject
    │   └── RequestRefused     any other 4xx: reject, never retried
    ├── LaunchError            a server that we were to start did not come up
    ├── SinkError              the log cannot be written (disk full, I/O error): stops the run
    └── TrainingFailed         a training has come to nothing, and would again

Foreign errors become one of these at the border where they arise, once.
"""


class StreamsynError(Exception):
    """Base of every error raised on purpose; its text is one line fit for a user."""


class ConfigError(StreamsynError):
    """Raised when something the user gave cannot be used; names the key, the flag or the file."""


class DirectoryInUse(ConfigError):
    """Raised when another process is writing to the run directory."""


class StoppedEarly(StreamsynError):
    """Raised when a run cannot go on but can be resumed."""


class FleetGone(StoppedEarly):
    """Raised when every server has been unusable for `fleet.give_up_s`."""


class ReaderGone(StoppedEarly):
    """Raised when the reader of our stdout closed its end."""


class ServerError(StreamsynError):
    """Raised when one try at one server brought no usable answer.

    Attributes:
        completion_tokens: What the server had written, as far as it said; it is lost.
    """

    def __init__(self, message: str, completion_tokens: int = 0) -> None:
        super().__init__(message)
        self.completion_tokens = completion_tokens


class ServerUnavailable(ServerError):
    """Raised when the server could not be reached, dropped the connection or answered 5xx."""


class ServerUnreachable(ServerUnavailable):
    """Raised when no connection to the server could be made; that says nothing about the request."""


class ServerBusy(ServerError):
    """Raised when the server's queue is full; the request itself is fine."""


class ServerTimeout(ServerError):
    """Raised when no answer came within `fleet.request_timeout_s`."""


class BrokenResponse(ServerError):
    """Raised when an answer is cut short, is no JSON, lacks what was asked for or was aborted."""


class RequestRefused(ServerError):
    """Raised when the server says that the request itself is wrong; asking again cannot help."""


class LaunchError(StreamsynError):
    """Raised when a server that was to be started for this run did not come up."""


class SinkError(StreamsynError):
    """Raised when the log cannot be written; what is on disk stays valid and resumable."""


class TrainingFailed(StreamsynError):
    """Raised when a training has diverged, or had nothing to train on; what was saved before stays."""


def root_cause(error: BaseException) -> BaseException:
    """The one error to tell of, out of a group of asyncio tasks that failed together.

    A bug before a log that cannot be written, that before a mistake of the user's, that before a stop.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    order = (StoppedEarly, ConfigError, StreamsynError)
    causes = [root_cause(part) for part in error.exceptions]
    return max(
        causes, key=lambda cause: next((n for n, kind in enumerate(order) if isinstance(cause, kind)), 9)
    )
