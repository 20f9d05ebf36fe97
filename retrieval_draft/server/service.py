"""The service of the HTTP server: model, tokenizer, engine and tenants, and their state."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.http.fair_pool import FairPool
from retrieval_draft.http.keys import KeyRing
from retrieval_draft.server.adapters import adapter_tenants
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.media.prompt import MediaPrompts
from retrieval_draft.server.openai.detokenize import Decode, decoder
from retrieval_draft.server.openai.model_defaults import usable_defaults
from retrieval_draft.server.openai.token_text import TokenTexts
from retrieval_draft.server.parsing.choice import ReplyParsing, reply_parsing
from retrieval_draft.server.scheduler.channel import Channel
from retrieval_draft.server.scheduler.engine import ServingEngine
from retrieval_draft.server.scheduler.events import EngineListener
from retrieval_draft.server.scheduler.job import Job
from retrieval_draft.server.settings import ServerSettings
from retrieval_draft.server.tenants import Tenants

__all__ = ["Loaded", "Service"]

_PREPARING = 32
"""Threads that tokenise, at most one for each tenant's short requests and one for its long ones."""

Result = TypeVar("Result")

_SHORT_BYTES = 1 << 15

_log = logging.getLogger("retrieval_draft.server")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Objects of a loaded model, for all requests or for one.

    Attributes:
        drafter: Of the request's tenant; of the default tenant outside of requests.
        settings: Limits.
        tokenizer: The model's.
        decode: Token ids to text.
        texts: Single tokens as text.
        longest: Characters of the longest token.
        overrides: Options that override the model's own generation configuration.
        tenants: Drafters by tenant.
        engine: Decodes.
        parsing: Of replies to chats.
        media: Makes prompts with images and sounds; None for a model of text.
        adapters: Drafters by tenant of each adapter, by its name.
        check: Raises once the request's client has left.
    """

    drafter: RetrievalDrafter
    settings: ServerSettings
    tokenizer: Any
    decode: Decode
    texts: TokenTexts
    longest: int
    overrides: Mapping[str, Any]
    tenants: Tenants
    engine: ServingEngine
    parsing: ReplyParsing
    media: MediaPrompts | None = None
    adapters: Mapping[str, Tenants] = field(default_factory=dict)
    check: Callable[[], object] = lambda: None

    def tenants_of(self, model: str | None) -> Tenants:
        """Drafters by tenant of the model, or of the adapter of that name."""
        return self.tenants if model is None else self.adapters.get(model, self.tenants)

    @property
    def most_prompt_tokens(self) -> int | None:
        """Limit of a prompt's tokens; None for any number."""
        limits = (self.settings.max_prompt_tokens, self.drafter.continuous.target.max_positions)
        return min((limit for limit in limits if limit is not None), default=None)


class Service:
    """Loads the model in the background, prepares requests and submits them to the engine.

    Args:
        settings: Limits.
        load: Makes drafter and tokenizer; called once, on a thread.
        keys: API keys of the tenants.
        chat_template: Replaces the tokenizer's own.
        load_processor: Makes the processor of a model that reads images or sounds; None for text alone.
        adapters: Folders of LoRA adapters by the names under which they are served.

    Attributes:
        settings: As given.
        keys: As given.
        chat_template: As given.
        listeners: Receive the engine's events; may grow until `start`.
        when_loaded: Called with the loaded objects, on the loading thread; may grow until `start`.
        created: Time at which the service was made, in seconds since 1970.
        error: Error of loading the model, or None.
    """

    def __init__(
        self,
        settings: ServerSettings,
        load: Callable[[], tuple[RetrievalDrafter, Any]],
        *,
        keys: KeyRing | None = None,
        chat_template: str | None = None,
        load_processor: Callable[[], Any] | None = None,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        self.settings = settings
        self.keys = keys if keys is not None else KeyRing({})
        self.chat_template = chat_template
        self.listeners: list[EngineListener] = []
        self.when_loaded: list[Callable[[Loaded], object]] = []
        self.created = int(time.time())
        self.error: Exception | None = None
        self._load, self._load_processor = load, load_processor
        self._adapters = dict(adapters or {})
        self._loaded: Loaded | None = None
        self._is_draining = False
        self._thread = threading.Thread(target=self._start, name="retrieval-draft-load", daemon=True)
        self._preparing = FairPool(_PREPARING, "retrieval-draft-prepare")

    def start(self) -> None:
        """Starts loading. Further calls do nothing."""
        if self._thread.ident is None:
            self._thread.start()

    def wait(self, timeout: float | None = None) -> Loaded:
        """Waits until the model is loaded.

        Raises:
            Exception: The error of loading.
        """
        self._thread.join(timeout)
        if self.error is not None:
            raise self.error
        return self.loaded

    def _start(self) -> None:
        try:
            drafter, tokenizer = self._load()
            drafter.warm_up()
            tenants = Tenants(drafter, self.keys.default, self.settings.history_bytes)
            overrides = usable_defaults(drafter)
            adapters = {name: self._adapter(drafter, name) for name in self._adapters}
            drafters = [drafter, *(each[self.keys.default] for each in adapters.values())]
            engine = ServingEngine(
                drafters, self.settings, self.listeners, self._share(self.settings.max_queue)
            )
            texts = TokenTexts(tokenizer)
            longest = max(map(len, tokenizer.get_vocab()), default=1)
            media, template = self._media(drafter), self.chat_template
            if template is None and media is not None:
                template = "\n".join(media.templates.values())
            loaded = Loaded(
                drafter, self.settings, tokenizer, decoder(tokenizer), texts, longest, overrides, tenants,
                engine,
                reply_parsing(
                    tokenizer, template, self.settings.tool_parser, self.settings.reasoning_parser
                ),
                media, adapters,
            )  # fmt: skip
            for call in self.when_loaded:
                call(loaded)
            engine.start()
            self._loaded = loaded
        except Exception as error:
            self.error = error
            _log.exception("The model could not be loaded.")

    def _adapter(self, drafter: RetrievalDrafter, name: str) -> Tenants:
        tenants = adapter_tenants(
            drafter, name, self._adapters[name], self.keys.default, self.settings.history_bytes
        )
        tenants[self.keys.default].warm_up()
        return tenants

    @property
    def models(self) -> list[str]:
        """Names that requests may give as their model: the model's, and those of its adapters."""
        return [self.settings.model_name, *self._adapters]

    def _media(self, drafter: RetrievalDrafter) -> MediaPrompts | None:
        """Makes prompts with images or sounds, for a model that reads them and has a processor; else None."""
        if self._load_processor is None or not drafter.target.takes_media:
            return None
        media = MediaPrompts(self._load_processor(), self.settings.media)
        return media if media.readers else None

    @property
    def loaded(self) -> Loaded:
        """The loaded objects.

        Raises:
            ApiError: The model is not loaded yet, or cannot be loaded (503).
        """
        if self._loaded is not None:
            return self._loaded
        if self.error is not None:
            raise ApiError(503, "The model could not be loaded; the server's log says why.")
        raise ApiError(503, "The model is still being loaded.", retry_after=5)

    async def submit(
        self,
        request_id: str,
        tenant: str,
        prepare: Callable[[Job, Loaded], object],
        traceparent: str | None = None,
        client_id: str | None = None,
        size: int = 0,
        model: str | None = None,
        priority: int = 0,
    ) -> Job:
        """Prepares a request on a thread, and queues it.

        Tenants do not wait for each other here, nor short requests for long ones. When cancelled, work that
        has not begun is dropped at once, and work that has begun at its next text.

        Args:
            request_id: Of the HTTP request.
            tenant: Its tenant.
            prepare: Adds prompts and replies to the job; may be slow.
            traceparent: W3C's header of the request, for traces.
            client_id: The client's id of the request, for logs.
            size: Bytes of the request.
            model: One of `models`; None for the first.
            priority: Lower numbers of a tenant come first.

        Raises:
            ApiError: It is not supported, or beyond a limit.
        """
        loaded, loop = self.loaded, asyncio.get_running_loop()
        if self._is_draining:
            raise ApiError(503, "The server is about to stop.", retry_after=5)
        job: Job

        def slow() -> None:
            loaded.engine.give_up(job, ApiError(503, "The stream was not read for too long."))

        channel = Channel(loop, self.settings.unread_tokens, slow)
        arrived = time.monotonic()

        def work(loaded: Loaded) -> Job:
            made = Job(
                request_id, tenant, loaded.drafter, channel, self.settings.request_seconds, arrived,
                traceparent, client_id, priority,
            )  # fmt: skip
            prepare(made, loaded)
            return made

        job = await self.work(tenant, work, size, model)
        try:
            loaded.engine.submit(job)
        except ApiError:
            job.release()
            channel.close()
            raise
        return job

    async def work(
        self,
        tenant: str,
        call: Callable[[Loaded], Result],
        size: int = 0,
        model: str | None = None,
    ) -> Result:
        """Result of work on a thread, which other tenants do not wait for.

        Args:
            tenant: For whom.
            call: May be slow.
            size: Bytes of the request.
            model: One of `models`; None for the first.

        Raises:
            ApiError: Of the work.
        """
        loaded, is_gone = self.loaded, False
        tenants = loaded.tenants_of(model)

        def check() -> None:
            if is_gone:
                raise ApiError(499, "The client has left.")

        def run() -> Result:
            return call(replace(loaded, drafter=tenants[tenant], check=check))

        try:
            return await asyncio.wrap_future(self._preparing.submit((tenant, size > _SHORT_BYTES), run))
        finally:
            is_gone = True  # the result of the running call is not used

    def check_model(self, name: str | None) -> None:
        """Refuses a model that is not served.

        Raises:
            ApiError: It is none of `models` (404).
        """
        served = self.models
        if name is not None and name not in served:
            names = ", ".join(map(repr, served))
            raise ApiError(404, f"There is no model {name!r} here; this server has {names}.", "model")

    def leave(self, job: Job) -> None:
        """Ends a job whose client has left. No-op if already finished."""
        job.channel.close()
        if self._loaded is not None:
            self._loaded.engine.give_up(job, ApiError(499, "The client has left."))

    def health(self) -> tuple[int, dict[str, Any]]:
        """HTTP status, and the body of the response."""
        body: dict[str, Any] = {"status": "ok", "model": self.settings.model_name}
        loaded = self._loaded
        if loaded is None:
            body["status"] = "loading" if self.error is None else "failed"
            return 503, body
        engine = loaded.engine
        body |= {"running": engine.running, "waiting": engine.waiting}
        every = [drafter for each in self._all_tenants(loaded) for drafter in each.made.values()]
        stores = [drafter.store for drafter in every if drafter.store is not None]
        if stores:
            body["store"] = loaded.drafter.store.health.state if loaded.drafter.store else "none"
            if any(store.health.state != "connected" for store in stores):
                # A store that is down costs speed only.
                body["status"] = "degraded"
        if engine.is_stuck:
            body["status"] = "stuck"
            return 503, body
        if self._is_draining:
            body["status"] = "draining"
            return 503, body
        return 200, body

    @property
    def is_ready(self) -> bool:
        """True if the model is loaded."""
        return self._loaded is not None

    @property
    def is_draining(self) -> bool:
        """True if the server is about to stop."""
        return self._is_draining

    def drain(self) -> None:
        """Refuses further requests; running ones continue."""
        self._is_draining = True
        if self._loaded is not None:
            self._loaded.engine.refuse()

    @property
    def is_idle(self) -> bool:
        """True if no request runs or waits."""
        engine = None if self._loaded is None else self._loaded.engine
        return engine is None or not (engine.running or engine.waiting)

    def abort(self) -> None:
        """Aborts all running and waiting requests."""
        if self._loaded is not None:
            self._loaded.engine.give_up_all(ApiError(503, "The server stops.", retry_after=5))

    def close(self, timeout: float = 10.0) -> None:
        """Ends the engine, and saves learned state."""
        self.drain()
        self._preparing.close()
        loaded = self._loaded
        if loaded is None:
            return
        self.abort()
        if not loaded.engine.stop(timeout):
            _log.warning("The engine did not end within %g s.", timeout)
        for tenants in self._all_tenants(loaded):
            tenants.close()

    def _all_tenants(self, loaded: Loaded) -> list[Tenants]:
        return [*loaded.adapters.values(), loaded.tenants]

    @property
    def choices_limit(self) -> int:
        """Requests that may be open at once."""
        return self.settings.max_queue + self.settings.max_batch + 32

    @property
    def tenant_limit(self) -> int:
        """Requests of one tenant that may be open at once."""
        return self._share(self.choices_limit)

    def _share(self, limit: int) -> int:
        """Share of a limit that one tenant may use: not all of it, where there are others."""
        return limit if len(self.keys.tenants) < 2 else max(limit // 2, 1)

    def extend(self, listeners: Sequence[EngineListener]) -> None:
        """Adds listeners, before `start`."""
        self.listeners += listeners
