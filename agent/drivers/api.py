"""A driver for any endpoint that speaks OpenAI's chat completions, retried by tenacity."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, stop_before_delay

from agent.drivers.driver import Completion, DriverError, MayRetry, Request
from agent.drivers.endpoint import Adaptation, Reply, body_of, bound, first_model
from agent.drivers.failure import CallError, blot, failure_of, wait_seconds
from agent.settings import Endpoint

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_BYTES_PER_TOKEN = 2  # of texts full of numbers; used only where no usage came back


@dataclass(frozen=True)
class _Try:
    """A request as it was sent."""

    number: int
    request: Request
    began: float


class ApiDriver:
    """Keeps up to `batch` requests in flight; each is tried again where that may help.

    One event loop serves all batches, so that connections are kept. It must not be used by two
    threads at once; `close` may be called from any.
    """

    def __init__(
        self,
        settings: Endpoint,
        *,
        base_url: str,
        model: str | None,
        key: str = "",
        has_answered: bool = False,
    ) -> None:
        """Take the address, the endpoint's name of the model (None: the first listed) and a key.

        `has_answered`: in an earlier process of this search.
        """
        self._settings = settings
        self._key = key
        self._model = model
        self._adaptation = Adaptation.begin(settings.structured)
        self._has_answered, self._refused = has_answered, 0  # requests in a row
        self._loop = asyncio.new_event_loop()
        self._client = AsyncOpenAI(
            api_key=self._key or "none",
            base_url=base_url,
            max_retries=0,
            timeout=settings.timeout,
            http_client=DefaultAsyncHttpxClient(
                trust_env=urlsplit(base_url).hostname not in _LOOPBACK,
                event_hooks={"response": [bound]},
            ),
        )
        self._address = base_url

    def complete(self, requests: Sequence[Request], may_retry: MayRetry) -> Iterator[Completion]:
        """Yield every try as it ends; the last one of each request has a text.

        An endpoint that has answered may refuse a single request, as one that is too long: that
        one ends with its failure, unless `driver.tries` in a row do.

        Raises:
            DriverError: a request was refused for good, or failed too often or for too long; the
                other requests were carried on with first.
        """
        tries: asyncio.Queue[Completion | None] = asyncio.Queue()
        gate = asyncio.Semaphore(self._settings.batch)
        tasks = [
            self._loop.create_task(self._answer(i, x, may_retry, tries, gate))
            for i, x in enumerate(requests)
        ]
        end = self._loop.create_task(_end(tasks, tries))
        try:
            while (completion := self._loop.run_until_complete(tries.get())) is not None:
                yield completion
                tries.task_done()
            for error in (x.exception() for x in tasks):
                if isinstance(error, CallError) and not self._is_single(error):
                    raise DriverError(f"driver {self._address}: {error.reason}")
                if error is not None and not isinstance(error, CallError):
                    raise error
        finally:
            for task in (*tasks, end):
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, end, return_exceptions=True))

    def close(self) -> None:
        """Close the connections."""
        if not self._loop.is_closed() and not self._loop.is_running():
            self._loop.run_until_complete(self._client.close())
            self._loop.close()

    async def _answer(
        self,
        number: int,
        request: Request,
        may_retry: MayRetry,
        tries: asyncio.Queue[Completion | None],
        gate: asyncio.Semaphore,
    ) -> None:
        """Put every try at one request into `tries`, the good one last.

        Raises:
            CallError: no further try would help.
        """
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._settings.tries)
            | stop_before_delay(self._settings.patience),
            wait=wait_seconds,
            retry=retry_if_exception(lambda e: isinstance(e, CallError) and e.may_pass),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                first = attempt.retry_state.attempt_number == 1
                if not first:
                    await tries.join()  # the caller knows of the failed try before it is asked
                    if not may_retry(number):
                        return
                async with gate:
                    if first:  # patience begins here, not while the request waited for its turn
                        attempt.retry_state.start_time = time.monotonic()
                    sent = _Try(number, request, time.perf_counter())
                    try:
                        reply = await self._call(request)
                    except CallError as error:
                        tries.put_nowait(self._failed(sent, error))
                        raise
                    tries.put_nowait(self._answered(sent, reply))

    async def _call(self, request: Request) -> Reply:
        """Return the reply of one call.

        Raises:
            CallError: there is none.
        """
        way = self._adaptation.way
        try:
            async with asyncio.timeout(self._settings.timeout):
                model = await self._model_name()
                create = self._client.chat.completions.with_streaming_response.create
                async with create(**way.arguments(request, model)) as response:
                    reply = Reply.from_body(await body_of(response))
        except Exception as error:  # noqa: BLE001  failure_of hands on what it does not know
            failure = failure_of(error, self._key)
            if self._model is None:
                words = f"no list of models, name one in driver.model: {failure.reason}"
                raise replace(failure, reason=words, may_cost=False) from None
            if failure.is_refusal and self._adaptation.change(way, failure.reason):
                failure = failure.at_once()
            self._refused += failure.is_about_request and not failure.may_pass
            raise failure from None
        self._adaptation.works(way)
        self._has_answered, self._refused = True, 0
        return reply

    def _is_single(self, error: CallError) -> bool:
        """Return whether an endpoint that is well may have refused this request alone."""
        few = self._refused < max(2, self._settings.tries)
        return self._has_answered and error.is_about_request and few

    async def _model_name(self) -> str:
        """Return the name to ask for: the setting's, or the first that the endpoint lists."""
        if self._model is None:
            async with self._client.models.with_streaming_response.list() as response:
                self._model = first_model(await body_of(response))
        return self._model

    def _answered(self, sent: _Try, reply: Reply) -> Completion:
        prompt, completion = reply.prompt_tokens, reply.completion_tokens
        estimated = prompt is None or completion is None
        if prompt is None or completion is None:
            prompt = _prompt_bytes(sent.request) // _BYTES_PER_TOKEN + 1
            completion = min(
                len(reply.text.encode(errors="replace")) // _BYTES_PER_TOKEN + 1,
                sent.request.max_tokens,
            )
        return self._completion(sent, reply.text, (prompt, completion), estimated, "")

    def _failed(self, sent: _Try, error: CallError) -> Completion:
        """Charge the most that the endpoint may have done, unless it surely did nothing."""
        tokens = (_prompt_bytes(sent.request), sent.request.max_tokens)
        spent = tokens if error.may_cost else (0, 0)
        return self._completion(sent, None, spent, error.may_cost, error.reason)

    def _completion(
        self, sent: _Try, text: str | None, tokens: tuple[int, int], estimated: bool, failure: str
    ) -> Completion:
        return Completion(
            request=sent.number,
            text=None if text is None else blot(text, self._key),
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
            seconds=time.perf_counter() - sent.began,
            model=blot(self._model or "", self._key),
            cost=self._settings.price.of(*tokens),
            estimated=estimated,
            failure=failure,
        )


async def _end(
    tasks: Sequence[asyncio.Task[None]], tries: asyncio.Queue[Completion | None]
) -> None:
    """Mark the end of all tries."""
    await asyncio.gather(*tasks, return_exceptions=True)
    tries.put_nowait(None)


def key_of(settings: Endpoint) -> str:
    """Return the key in the environment variable that is named, nothing where it is not set.

    Raises:
        ValueError: it has characters that no header can hold, or that look different in the words
            of an error, where the key could then not be blotted out.
    """
    variable = settings.key_variable
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable() or set(key) & set(" '\"\\"):
        raise ValueError(f"driver.key_variable: {variable} holds more than a key's characters")
    return key


def _prompt_bytes(request: Request) -> int:
    """Return the bytes of a prompt's words: a token is at least one."""
    return sum(len(m["content"].encode(errors="replace")) for m in request.messages)
