"""The requests that wait. Plain Python.

Under order "fair" clients share by virtual token counters (VTC; Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024, algorithm 2): the next request is of the client that was served least, and a client that had nothing
waiting is lifted to those that had, so that idleness earns no credit. Invariant, for clients that both have requests
waiting: their counters differ by at most 2 max(longest prompt, OUTPUT_WEIGHT x tokens of a full batch), theorem 4.4.
Other orders know one client.
"""

from __future__ import annotations

import heapq

from flover.engine.policy import Policy
from flover.request import Request

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0  # of a token, as in the paper

Entry = tuple[float, int, Request]  # policy key, arrival, request


class WaitingQueue:
    """Requests in the order of a policy. `served`: virtual counter of each client, by its number."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._numbers: dict[str, int] = {}
        self._heaps: list[list[Entry]] = []  # by client
        self.served: list[float] = []
        self._last = 0  # client that left the queue last

    def __bool__(self) -> bool:
        return any(self._heaps)

    @property
    def shares(self) -> bool:
        """Whether there is anyone to share with."""
        return len(self._numbers) > 1

    def number(self, request: Request) -> int:
        """Of its client."""
        client = request.client if self._policy.order == "fair" else ""
        number = self._numbers.setdefault(client, len(self._numbers))
        if number == len(self._heaps):
            self._heaps.append([])
            self.served.append(0.0)
        return number

    def push(self, request: Request) -> None:
        """A new request."""
        number = self.number(request)
        if not self._heaps[number]:
            active = [served for served, heap in zip(self.served, self._heaps) if heap]
            floor = min(active) if active else self.served[self._last]
            self.served[number] = max(self.served[number], floor)
        self.put_back(request)

    def put_back(self, request: Request) -> None:
        """One that was here before: popped, or preempted."""
        heapq.heappush(self._heaps[self.number(request)], (self._policy.key(request), request.arrival, request))

    def pop(self) -> Request | None:
        """The next that has not ended; None if there is none."""
        while True:
            number = min((n for n, heap in enumerate(self._heaps) if heap), key=self.served.__getitem__, default=None)
            if number is None:
                return None
            request = heapq.heappop(self._heaps[number])[2]
            self._last = number
            if not request.finished:
                return request

    def charge_prompt(self, request: Request) -> None:
        """It has been admitted, for the first time."""
        self.served[self.number(request)] += PROMPT_WEIGHT * request.num_prompt_tokens

    def charge_outputs(self, tokens: list[float]) -> None:
        """Tokens decoded in a step, by client."""
        for number, count in enumerate(tokens):
            self.served[number] += OUTPUT_WEIGHT * count
