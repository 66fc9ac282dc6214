"""The mirror as a thread: it follows the manifest, copies what is sealed, and tries again after a failure.

What is copied, and in which order, is decided in `mirror_plan`. Writing the log never waits for the mirror.
It is a thread and not an asyncio task: a call that hangs in a file system cannot be cancelled, and must not
delay the end of the run.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import structlog

from streamsyn.config.sections import SinkSection
from streamsyn.errors import ConfigError, TakenOver
from streamsyn.io.places import reason
from streamsyn.plain_text import without_userinfo
from streamsyn.sink.epoch import Epoch
from streamsyn.sink.log import RunLog
from streamsyn.sink.manifest import SealedShard
from streamsyn.sink.mirror_plan import MirrorPlan

log = structlog.get_logger()

FIRST_CONTACT_S = 10.0
"""A run waits this long at most for the mirror's first answer."""
CHECK_S = 10.0
"""A run looks this often whether a different one has taken its mirror."""
BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0
_MAX_NAMED = 8
"""Missing files named in the log."""


@contextmanager
def mirrored(
    root: Path, sink: SinkSection, epoch: Epoch | None = None, *, takes_over: bool = False
) -> Iterator["Mirror | None"]:
    """Mirror a run directory while the block runs; yields None when `sink.mirror` is not set.

    At the end of the block the mirror has `sink.mirror_timeout_s` to catch up; after an error it has no time.

    Args:
        root: The run directory.
        sink: Has the URL.
        epoch: That of the run directory; it is lost when a different run takes the mirror.
        takes_over: Whether to take the mirror from a run of this machine that is alive.

    Raises:
        ConfigError: The URL cannot be used, or the mirror holds a different run.
        TakenOver: A newer run has the mirror.
    """
    if not sink.mirror:  # "" switches off the mirror that run.json remembers
        yield None
        return
    mirror = Mirror(root, sink.mirror, epoch or Epoch(root), takes_over=takes_over)
    timeout_s = 0.0
    try:
        mirror.start()
        yield mirror
        timeout_s = sink.mirror_timeout_s
    finally:
        mirror.finish(timeout_s)
    mirror.raise_refusal(TakenOver)


class Mirror:
    """Copies what a log has sealed, in a thread. Its methods are for the thread that runs the run.

    Args:
        root: The run directory.
        url: Where to copy it to.
        epoch: That of the run directory; it is lost when a different run takes the mirror.
        takes_over: Whether to take the mirror from a run of this machine that is alive.

    Raises:
        ConfigError: The URL cannot be used.
    """

    def __init__(self, root: Path, url: str, epoch: Epoch, *, takes_over: bool = False) -> None:
        self._url = without_userinfo(url)
        self._epoch = epoch
        self._rng = Random()
        self._stopped = threading.Event()
        self._plan = MirrorPlan(root, url, self._stopped, takes_over=takes_over)
        try:
            self._plan.connect()
        except OSError as error:  # it is down; the thread will try again
            log.warning("mirror.behind", url=self._url, why=reason(error))
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._changed = threading.Condition()
        # All that follows is guarded by the condition.
        self._log: RunLog | None = None
        self._needed: dict[str, int] = {}
        """For each shard of samples, the contexts that the log held when it was sealed, or more."""
        self._has_news = False
        self._is_ending = False
        self._has_answered = False
        self._refusal: ConfigError | TakenOver | None = None

    def start(self) -> None:
        """Start the thread, and wait up to FIRST_CONTACT_S for the first answer.

        Raises:
            ConfigError: The mirror holds a different run.
            TakenOver: A newer run has just taken it.
        """
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._has_answered, FIRST_CONTACT_S)
        self.raise_refusal(ConfigError, TakenOver)

    def raise_refusal(self, *kinds: type[Exception]) -> None:
        """Raise the error that has ended the mirror, if there is one of these kinds."""
        with self._changed:
            if isinstance(self._refusal, kinds):
                raise self._refusal

    def follow(self, run_log: RunLog) -> None:
        """Copy what the log has sealed, and what it seals from now on."""
        samples = run_log.manifest.of_kind("samples")
        with self._changed:
            self._log = run_log
            self._needed = {shard.path: run_log.contexts.rows for shard in samples}
            self._wake()
        run_log.manifest.on_line = self._on_line

    def finish(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for the mirror to catch up, and log what is then missing."""
        with self._changed:
            self._is_ending = True
            self._wake()
            needed = dict(self._needed)
        if timeout_s and self._log is not None and (missing := self._plan.missing(needed)):
            log.info("mirror.catching_up", url=self._url, files=len(missing), at_most_s=timeout_s)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        self._stopped.set()
        with self._changed:
            self._wake()
        if self._log is not None and (missing := self._plan.missing(needed)):
            log.warning(
                "mirror.behind",
                url=self._url,
                missing=", ".join(missing[:_MAX_NAMED]),
                files=len(missing),
                then="the next run on this directory copies them",
            )

    def _on_line(self, line: Any) -> None:
        """A line was appended to the manifest. Called by the thread that wrote it, which must not wait."""
        with self._changed:
            if isinstance(line, SealedShard) and line.kind == "samples" and self._log is not None:
                self._needed[line.path] = self._log.contexts.rows
            self._wake()

    def _wake(self) -> None:
        self._has_news = True
        self._changed.notify_all()

    # What follows runs in the mirror's thread.

    def _run(self) -> None:
        tries, steps, has_begun = 0, 0, False
        while self._wait(has_begun=has_begun):
            try:
                if not has_begun:
                    self._plan.begin()
                    has_begun = True
                    self._report_answer(None)
                else:
                    self._copy()
                tries = 0
            except ConfigError as error:
                if self._has_answered:  # otherwise `start` raises it
                    log.warning("mirror.refused", why=str(error))
                self._report_answer(error)
                return
            except TakenOver as error:
                self._epoch.lose(str(error))  # ends the run at its next write
                self._report_answer(error)
                return
            except Exception as error:  # noqa: BLE001 - each file system has errors of its own
                if self._plan.steps > steps:  # some progress was made
                    tries, steps = 0, self._plan.steps
                pause_s = self._rng.uniform(0, min(LONGEST_BACKOFF_S, BACKOFF_S * 2 ** min(tries, 30)))
                tries += 1
                log.warning("mirror.behind", url=self._url, why=reason(error), again_in_s=round(pause_s, 1))
                self._report_answer(None)
                self._pause(pause_s)

    def _wait(self, *, has_begun: bool) -> bool:
        """Wait for something to do, or to check; False when the run has ended and there is nothing."""
        with self._changed:
            self._changed.wait_for(lambda: not has_begun or self._has_news or self._is_ending, CHECK_S)
            if self._stopped.is_set() or (self._is_ending and has_begun and not self._has_news):
                return False
            if has_begun:
                self._has_news = False
            return True

    def _copy(self) -> None:
        with self._changed:
            if self._log is None:
                return
            needed = dict(self._needed)
        self._plan.copy(needed)

    def _pause(self, seconds: float) -> None:
        """Wait before the next try; end the wait early when the run ends."""
        with self._changed:
            self._has_news = True
            was_ending = self._is_ending
            self._changed.wait_for(
                lambda: self._stopped.is_set() or self._is_ending != was_ending, timeout=seconds
            )

    def _report_answer(self, refusal: ConfigError | TakenOver | None) -> None:
        with self._changed:
            self._has_answered = True
            self._refusal = refusal
            self._changed.notify_all()
