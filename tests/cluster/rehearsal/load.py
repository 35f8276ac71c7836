"""Load: requests to every host of a service while hosts come and go, as a load balancer sends them."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from itertools import count
from types import TracebackType

TIMEOUT_S = 20.0
THREADS = 2


class Load:
    """Sends texts to embed, in turn to each host, during the body.

    A request that a host does not answer is sent to the next, as it changes nothing: it has failed when none answers.
    """

    def __init__(self, hosts: list[str], key: str) -> None:
        self.hosts, self.key = hosts, key
        self.sent = self.failed = self.retried = 0
        self.slowest = 0.0
        self.reasons: list[str] = []
        self._numbers = count()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(THREADS)]

    def answers(self, host: str) -> bool:
        """Whether a host embeds a text."""
        return self._ask(host, "a red circle") == ""

    def figures(self) -> dict[str, object]:
        """What came of it."""
        return {
            "sent": self.sent,
            "failed": self.failed,
            "sent_again": self.retried,
            "slowest_s": round(self.slowest, 2),
            "reasons": self.reasons[:5],
        }

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            number = next(self._numbers)
            began = time.monotonic()
            tries = 0
            reason = "not tried"
            while reason and tries < 2 * len(self.hosts):
                reason = self._ask(self.hosts[(number + tries) % len(self.hosts)], f"text number {number}")
                tries += 1
                if reason:
                    with self._lock:
                        self.reasons.append(reason)
            with self._lock:
                self.sent += 1
                self.failed += bool(reason)
                self.retried += tries > 1
                self.slowest = max(self.slowest, time.monotonic() - began)
            time.sleep(0.05)

    def _ask(self, host: str, text: str) -> str:
        """Why it was not answered; empty if it was."""
        body = json.dumps({"model": "vladva", "input": text}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(f"{host}/v1/embeddings", data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return "" if json.load(answer)["data"][0]["embedding"] else "no embedding"
        except urllib.error.HTTPError as error:
            return f"{host}: {error.code} {error.read()[:200]!r}"
        except OSError as error:
            return f"{host}: {error}"
