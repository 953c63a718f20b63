"""Several drivers in order: the next one takes over what the one before could not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from agent.drivers.driver import Completion, Driver, DriverError, MayRetry, Request
from agent.settings import Endpoint

Open = Callable[[], Driver]


class ChainDriver:
    """Opens a driver when it is first needed; one that gave up is not asked again."""

    def __init__(self, openers: Sequence[Open], endpoints: Sequence[Endpoint] = ()) -> None:
        """Take what opens each driver, in order, at least one; each may raise DriverError.

        `endpoints` say how each of them samples, and bound its replies; without them all do as
        the requests ask.
        """
        self._openers, self._endpoints = list(openers), list(endpoints)
        self._driver: Driver | None = None
        self._reasons: list[str] = []

    def complete(self, requests: Sequence[Request], may_retry: MayRetry) -> Iterator[Completion]:
        """Yield every try of the driver in charge, and of the next ones at what is left.

        To a next driver, too, only those go whose failed try may be followed by another one.

        Raises:
            DriverError: all drivers gave up.
        """
        left, failed = list(range(len(requests))), set[int]()
        permit = _lasting(may_retry)
        while self._openers:
            try:
                driver = self._in_charge()
                left = [i for i in left if i not in failed or permit(i)]
                if not left:
                    return
                asked = list(left)
                batch = [self._as_it_samples(requests[i]) for i in asked]
                # Bound now: the driver ends with this round.
                for completion in driver.complete(batch, _renumbered(permit, asked)):
                    number = asked[completion.request]
                    if completion.text is None:
                        failed.add(number)
                    else:
                        left.remove(number)
                    yield replace(completion, request=number)
            except DriverError as error:
                self._give_up(str(error))
            else:
                return
        raise DriverError("; then ".join(self._reasons))

    def close(self) -> None:
        """Close the driver in charge."""
        if self._driver is not None:
            self._driver.close()

    def _in_charge(self) -> Driver:
        if self._driver is None:
            self._driver = self._openers[0]()
        return self._driver

    def _as_it_samples(self, request: Request) -> Request:
        """Return a request as the endpoint in charge takes it."""
        if not self._endpoints:
            return request
        longest = min(request.max_tokens, self._endpoints[0].max_tokens)
        return replace(request, max_tokens=longest, temperature=self._endpoints[0].temperature)

    def _give_up(self, reason: str) -> None:
        self.close()
        self._reasons.append(reason)
        self._openers.pop(0)
        self._endpoints = self._endpoints[1:]
        self._driver = None


def _lasting(may_retry: MayRetry) -> MayRetry:
    """Return a `may_retry` that several drivers may ask: what it refused once stays refused."""
    refused: set[int] = set()

    def permit(i: int) -> bool:
        if i not in refused and not may_retry(i):
            refused.add(i)
        return i not in refused

    return permit


def _renumbered(may_retry: MayRetry, asked: Sequence[int]) -> MayRetry:
    return lambda i: may_retry(asked[i])
