"""A driver that brings its own vLLM server."""

from __future__ import annotations

from collections.abc import Callable

from agent.drivers.api import ApiDriver, key_of
from agent.drivers.vllm_server import VllmServer
from agent.settings import Endpoint


class VllmDriver(ApiDriver):
    """Calls a server that it starts, or finds at its port, and stops with itself."""

    def __init__(
        self,
        settings: Endpoint,
        server: VllmServer,
        on_wait: Callable[[float], None],
        *,
        has_answered: bool = False,
    ) -> None:
        """Wait for the server.

        Raises:
            ValueError: there is no vLLM to start.
            DriverError: the server ended, or did not answer within `settings.start_seconds`.
        """
        server.start(settings.start_seconds, on_wait)
        self._server = server
        # The variable that is not named is that of endpoints elsewhere: no key for this server.
        is_named = settings.key_variable != Endpoint.model_fields["key_variable"].default
        key = key_of(settings) if is_named else ""
        super().__init__(
            settings,
            base_url=server.url,
            model=server.model_id,
            key=key,
            has_answered=has_answered,
        )

    def close(self) -> None:
        """Close the connections and stop the server."""
        super().close()
        self._server.stop()
