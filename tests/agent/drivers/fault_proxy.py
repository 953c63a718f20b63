"""A proxy before a chat endpoint that spoils a share of the calls."""

from __future__ import annotations

import http.client
import random
import threading
from collections import Counter
from collections.abc import Sequence
from email.utils import formatdate
from time import time
from urllib.parse import urlsplit

from tests.agent.drivers.chat_server import RESET, Act, Call, ChatServer, refused

FAULTS = ("reset", "stall", "429 seconds", "429 date", "500", "half", "slow")


class FaultProxy(ChatServer):
    """Hands calls on to `upstream`; a drawn one of `share` of them goes wrong.

    Attributes:
        drawn: what became of the calls: "" for a good one, or the fault.
    """

    def __init__(
        self,
        upstream: str,
        *,
        timeout: float,
        seed: int,
        share: float = 0.3,
        faults: Sequence[str] = FAULTS,
    ) -> None:
        """Take the endpoint's address and the client's `timeout`, which stalls outlast."""
        super().__init__(())
        self._host, self._timeout = urlsplit(upstream).netloc, timeout
        self._share, self._faults = share, tuple(faults)
        self._rng, self._drawing = random.Random(seed), threading.Lock()
        self.drawn: Counter[str] = Counter()

    def act(self, call: Call) -> Act:
        with self._drawing:
            spoiled = self._rng.random() < self._share
            fault = self._rng.choice(self._faults) if spoiled else ""
            self.drawn[fault] += 1
        date = formatdate(time() + 1, usegmt=True)
        alone = {
            "reset": RESET,
            "stall": Act(delay=3 * self._timeout, sent=0),
            "429 seconds": refused(429, "slow down", retry_after="0.05"),
            "429 date": refused(429, "slow down", retry_after=date),
            "500": refused(500, "oops"),
        }
        if fault in alone:
            return alone[fault]
        answer = self._forward(call)
        if fault == "half":
            return answer.but(sent=len(answer.body) // 2)
        # Every piece comes in time, the whole does not.
        return answer.but(pause=self._timeout / 5) if fault == "slow" else answer

    def _forward(self, call: Call) -> Act:
        connection = http.client.HTTPConnection(self._host)
        connection.request("POST", call.path, call.raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return Act(response.status, body)
