"""Whether more requests at a time still pay, told from the answers alone: a plain state machine."""

from dataclasses import dataclass, field

_PAYS = 0.25
"""More in flight pays when the rate of tokens grows by at least this part of what the cap grew by."""
_SLOWER = 3.0
"""Answers that take so many times as long a token as in the quickest round, and no more of them."""
_QUICK = 2.0
_STEADY = 1.1
_BACK = 0.85
_TRY_EVERY = 4
"""Rounds between two tries to grow, once growing has not paid."""
_FORGET = 1.02
"""The quickest round counts a little less each time: servers and texts change."""


@dataclass(slots=True)
class Rounds:
    """Additive increase, multiplicative decrease on latency, for servers that do not tell their load.

    A round is as many answers as the cap allows requests. After each, the rate of tokens is held against
    that of the round before: by Little's law a server that is not full gives more tokens a second when
    it has more requests, a full one only makes each of them slower. Growth that did not pay is taken
    back, and tried again later by a little.
    """

    _began_at: float | None = None
    _answers: int = 0
    _tokens: int = 0
    _seconds: float = 0.0
    _cap: int = 0
    _rate: float = 0.0
    _quickest: float = field(default=float("inf"))
    _is_ramping: bool = True
    _since_try: int = 0

    def answered(self, now: float, seconds: float, tokens: int, cap: int) -> float | None:
        """One more answer. At the end of a round, what to multiply the cap by; else None."""
        if self._began_at is None:
            self._began_at = now - seconds
        self._answers += 1
        self._tokens += max(1, tokens)
        self._seconds += seconds
        if self._answers < cap:
            return None
        rate = self._tokens / max(now - self._began_at, 1e-9)
        a_token = self._seconds / self._tokens
        verdict = self._verdict(rate, a_token, cap)
        self._cap, self._rate = cap, rate
        self._quickest = min(self._quickest * _FORGET, a_token)
        self._began_at, self._answers, self._tokens, self._seconds = now, 0, 0, 0.0
        return verdict

    def _verdict(self, rate: float, a_token: float, cap: int) -> float:
        if self._cap == 0:
            return _QUICK
        grown, faster = cap / self._cap - 1, rate / self._rate - 1
        if grown > 0 and faster < _PAYS * grown:
            self._is_ramping = False
            return self._cap / cap
        if a_token > _SLOWER * self._quickest and faster <= 0:
            self._is_ramping = False
            return _BACK
        if self._is_ramping:
            return _QUICK
        self._since_try = (self._since_try + 1) % _TRY_EVERY
        return 1.0 if self._since_try else _STEADY
