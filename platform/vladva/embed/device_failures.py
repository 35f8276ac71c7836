"""Device failures: what actors were computing when their device failed, kept for those that come after them.

    <uri>/_device_failures/<name>-<random>.json     what was computed (a batch, or one item of it), and the error

An item may break the device each time (an index out of range does). Then the batch that holds it is tried again as a
whole, and after that item by item, until it is found; so a run ends, whatever is in its corpus.
"""

from __future__ import annotations

import secrets

from vladva.core import storage
from vladva.core.storage import join

TRIES = 2  # of a batch, and then of each of its items


class DeviceFailures:
    """The failures that were noted when this process began, and its own."""

    def __init__(self, table_uri: str) -> None:
        self.uri = join(table_uri, "_device_failures")
        self.reasons: dict[str, list[str]] = {}
        for file in storage.list_files(self.uri, ".json"):
            noted = storage.read_json(file)
            self.reasons.setdefault(noted["computed"], []).append(noted["error"])

    def count(self, computed: str) -> int:
        """How often the device failed on it."""
        return len(self.reasons.get(computed, []))

    def reason(self, computed: str) -> str:
        """What the device said the last time."""
        return self.reasons[computed][-1]

    def note(self, computed: str, error: Exception) -> None:
        """Keep that the device failed on it."""
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        storage.write_json(
            join(self.uri, f"{computed}-{secrets.token_hex(4)}.json"), {"computed": computed, "error": message}
        )
