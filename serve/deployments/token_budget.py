"""Admission: how much work a replica takes on before it says "later", counted in tokens."""

from collections.abc import Iterator
from contextlib import contextmanager

from serve.protocol.errors import Failure


class TokenBudget:
    """The tokens a replica may have accepted and not yet finished, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def refusal(self, tokens: int) -> Failure | None:
        """Why `tokens` more cannot be taken on, or None where they can."""
        if tokens > self.limit:
            message = f"the request costs {tokens:,} tokens; one request may cost at most {self.limit:,}"
            return Failure(413, message, "request_too_large")
        if self.held + tokens > self.limit:
            message = f"{self.held:,} tokens of work are waiting, {self.limit:,} may; try again later"
            return Failure(429, message, "overloaded")
        return None

    @contextmanager
    def hold(self, tokens: int) -> Iterator[None]:
        """Count `tokens` as accepted until the work is done or cancelled."""
        self.held += tokens
        try:
            yield
        finally:
            self.held -= tokens
