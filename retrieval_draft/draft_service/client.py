"""The engine's client of the drafting service, without torch and numpy, and with bounded waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from retrieval_draft.draft_service import wire
from retrieval_draft.draft_service.client_session import RemoteSession, Tokens, plain
from retrieval_draft.draft_service.errors import (
    ServiceUnavailableError,
    error_of,
)
from retrieval_draft.draft_service.transport import Address, Connection
from retrieval_draft.draft_service.wire import Draft, Info, TopLogprobs
from retrieval_draft.errors import InvalidInputError, RetrievalDraftError

__all__ = ["Draft", "DraftClient", "Info", "RemoteSession", "TopLogprobs"]

Share = Literal["none", "reply", "all"]
_KEPT_CONNECTIONS = 16


class DraftClient:
    """Client of a drafting service. Several threads may share one; each session belongs to one at a time.

    Connections are kept open and reused. No call takes longer than `timeout`. With ``on_error="empty"`` the
    engine sees no failure of the service or the network: it gets empty drafts and decodes plainly, the
    service is not called for `retry_seconds`, and sessions continue once it answers again.

    Args:
        url: ``http://HOST:PORT``, ``https://...`` or ``unix:///PATH/TO/SOCKET``.
        api_key: API key, if the service requires one.
        timeout: Seconds for a whole call.
        on_error: "raise", or "empty" to continue without drafts.
        retry_seconds: With "empty", time without calls after the service did not answer.

    Raises:
        InvalidInputError: `url`, `on_error` or `api_key` cannot be used.

    Example:
        with DraftClient("http://127.0.0.1:8700", on_error="empty") as client:
            session = client.open(prompt)
            draft = session.step([first_token], nodes=16)
            while running:
                emitted = verify(draft.tokens, draft.parents)
                draft = session.step(emitted, nodes=16)
            session.close()
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 1.0,
        on_error: Literal["raise", "empty"] = "raise",
        retry_seconds: float = 1.0,
    ) -> None:
        if on_error not in ("raise", "empty"):
            raise InvalidInputError(f"on_error is {on_error!r}.", "Choose from: raise, empty.")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
            raise InvalidInputError("The API key has characters that no header can carry.")
        if not timeout > 0:
            raise InvalidInputError(f"timeout is {timeout}; it must be positive.")
        self._address = Address(url)
        self._headers = f"Content-Type: {wire.MESSAGE_PACK}\r\n"
        if api_key is not None:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._timeout = timeout
        self._silent = on_error == "empty"
        self._retry_seconds = retry_seconds
        self._rest_until = 0.0
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        self.failures = 0
        """Failed calls, suppressed ones included."""

    def info(self) -> Info:
        """Describes the service. Raises for every `on_error`.

        Raises:
            ServiceUnavailableError: It does not answer.
            DraftServiceError: It refuses the request.
        """
        return self._call("GET", "", b"", Info)

    def open(
        self,
        prompt: Tokens,
        references: Sequence[Tokens] = (),
        *,
        share: Share | None = None,
        fingerprint: str = "",
        nodes: int = 0,
        max_depth: int | None = None,
        chain: bool = False,
        min_prob: float = 0.0,
    ) -> RemoteSession:
        """Starts a session.

        Args:
            prompt: All of the text so far, one token at least.
            references: Texts that the reply may quote.
            share: Parts that other servers may learn: "none", "reply" or "all"; None for the service's
                default.
            fingerprint: Of the engine's tokenizer, to check that it is the service's.
            nodes: Of a first draft, in ``session.draft``; 0 for none, as the first token comes from the
                prompt's own pass.
            max_depth: As `RemoteSession.step`, like the rest.
            chain: A chain instead of a tree.
            min_prob: Smallest path probability of a chain's tokens.

        Raises:
            InvalidInputError: The prompt is empty.
            RetrievalDraftError: The call failed, and `on_error` is "raise".
        """
        text = plain(prompt)
        if not text:
            raise InvalidInputError("The prompt is empty.", "Pass one token at least, such as the bos token.")
        request = wire.OpenRequest(
            prompt=text,
            references=[plain(each) for each in references],
            share=share,
            fingerprint=fingerprint,
            nodes=nodes,
            max_depth=max_depth,
            chain=chain,
            min_prob=min_prob,
        )
        session = RemoteSession(self, len(text), text[-1])
        try:
            if self._may_call():
                reply = self._call("POST", "/open", wire.encode(request), wire.OpenReply)
                session._key = reply.session
                session.draft = reply.draft if nodes else session.draft
        except RetrievalDraftError as error:
            self._failed(error)
        return session

    def step(
        self,
        steps: Sequence[tuple[RemoteSession, Tokens]],
        *,
        nodes: int = 60,
        max_depth: int | None = None,
        chain: bool = False,
        min_prob: float = 0.0,
    ) -> list[Draft]:
        """Steps of many sessions in one round trip.

        Args:
            steps: Sessions, each once, and the tokens that their engine emitted.
            nodes: As `RemoteSession.step`, like the rest.
            max_depth: Largest useful length of a path.
            chain: Chains instead of trees.
            min_prob: Smallest path probability of a chain's tokens.

        Returns:
            Their drafts. One that failed is empty, with the reason in ``error``.

        Raises:
            RetrievalDraftError: The whole call failed, and `on_error` is "raise".
        """
        want = wire.Want(nodes=nodes, max_depth=max_depth, chain=chain, min_prob=min_prob)
        for start in range(0, len(steps), wire.MAX_STEPS):
            part = steps[start : start + wire.MAX_STEPS]
            for session, tokens in part:
                session._note(plain(tokens))
            self._step([session for session, _ in part], want)
        return [session.draft for session, _ in steps]

    def close(self) -> None:
        """Closes the connections. Open sessions are left to expire."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def __enter__(self) -> DraftClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _step(
        self,
        sessions: Sequence[RemoteSession],
        want: wire.Want,
        top_logprobs: TopLogprobs | None = None,
        close: Literal["finished", "dropped"] | None = None,
    ) -> None:
        """Sends the waiting tokens, and gives every session its draft."""
        alive = [session for session in sessions if session.alive]
        if not alive or not self._may_call():
            return
        steps = [
            wire.Step(
                session=session._key,
                tokens=session._pending,
                at=session.length - len(session._pending),
                # There are no rows for tokens that wait from earlier steps.
                top_logprobs=top_logprobs if session._fresh == len(session._pending) else None,
                close=close,
                nodes=want.nodes,
                max_depth=want.max_depth,
                chain=want.chain,
                min_prob=want.min_prob,
            )
            for session in alive
        ]
        try:
            reply = self._call("POST", "/step", wire.encode(wire.StepRequest(steps=steps)), wire.StepReply)
            if len(reply.drafts) != len(alive):
                raise ServiceUnavailableError("The service answered another number of steps.")
        except RetrievalDraftError as error:
            if len(alive) == 1:
                alive[0]._fail(error)
            self._failed(error)
            return
        for session, draft in zip(alive, reply.drafts, strict=True):
            session._take(draft)
            self.failures += draft.error is not None

    def _may_call(self) -> bool:
        return time.monotonic() >= self._rest_until

    def _failed(self, error: RetrievalDraftError) -> None:
        """Counts a failure; raises it if `on_error` is "raise"."""
        self.failures += 1
        if not self._silent:
            raise error
        if isinstance(error, ServiceUnavailableError):
            self._rest_until = time.monotonic() + self._retry_seconds

    def _call(self, method: str, path: str, body: bytes, kind: type[wire.Message]) -> wire.Message:
        status, answer = self._exchange(method, f"/v1/draft{path}", body)
        try:
            if status == 200:
                return wire.decode(answer, kind)
            # A layer before the service, such as a check of keys, may answer in JSON.
            failure = wire.decode(answer, wire.ErrorReply, json=answer[:1] == b"{").error
        except (msgspec.DecodeError, RecursionError) as error:
            raise ServiceUnavailableError(
                f"What answers at {self._address.url} with status {status} is no drafting service."
            ) from error
        raise error_of(status, failure.message, failure.hint)

    def _exchange(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        deadline = time.monotonic() + self._timeout
        while True:
            with self._lock:
                if self._closed:
                    raise ServiceUnavailableError("The client is closed.")
                connection = self._idle.pop() if self._idle else None
            kept = connection is not None
            try:
                if connection is None:
                    left = max(0.001, deadline - time.monotonic())
                    connection = Connection(self._address, self._headers, left)
                result = connection.exchange(method, path, body, deadline)
            except BaseException as error:
                if connection is not None:
                    connection.close()
                if kept and isinstance(error, ConnectionError) and not isinstance(error, RetrievalDraftError):
                    continue  # closed by the service while idle; the service ignores repeated tokens
                if isinstance(error, OSError) and not isinstance(error, RetrievalDraftError):
                    raise ServiceUnavailableError(
                        f"The drafting service at {self._address.url} does not answer: {error}.",
                        "Is it running? See retrieval-draft drafts serve --help.",
                    ) from error
                raise
            self._keep(connection)
            return result

    def _keep(self, connection: Connection) -> None:
        with self._lock:
            if connection.reusable and not self._closed and len(self._idle) < _KEPT_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()
