"""One request of an engine, at a drafting service."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from retrieval_draft.draft_service import wire
from retrieval_draft.draft_service.errors import (
    DraftServiceError,
    ServiceFullError,
    UnknownSessionError,
    error_of,
)
from retrieval_draft.draft_service.wire import Draft, TopLogprobs
from retrieval_draft.errors import InvalidInputError, RetrievalDraftError

if TYPE_CHECKING:
    from retrieval_draft.draft_service.client import DraftClient

__all__ = ["RemoteSession", "Tokens", "plain"]

Tokens = Iterable[int]
_MAX_PENDING = 1 << 16


class RemoteSession:
    """One request of an engine. One thread at a time may use it.

    Attributes:
        length: Tokens of the text, as the engine has it.
        draft: The last one.
        alive: Whether further drafts are possible. False once the service does not know the session; the
            request then continues without drafts.
    """

    def __init__(self, client: DraftClient, length: int, last: int) -> None:
        self._client = client
        self._key = ""
        self._pending: list[int] = []
        self._fresh = 0
        self._last = last
        self.length = length
        self.draft = self._empty()
        self._over = False

    @property
    def alive(self) -> bool:
        """True if further drafts are possible."""
        return bool(self._key) and not self._over

    def step(
        self,
        tokens: Tokens,
        *,
        nodes: int = 60,
        max_depth: int | None = None,
        chain: bool = False,
        min_prob: float = 0.0,
        top_logprobs: TopLogprobs | None = None,
    ) -> Draft:
        """Sends the emitted tokens, and returns the next draft, in one round trip.

        Args:
            tokens: Emitted since the last step, in order, the bonus token included. After a failure they are
                kept, and sent with the next ones.
            nodes: Draft nodes at most, the root not counted.
            max_depth: Largest useful length of a path; None for any.
            chain: One path instead of a tree, of at most `nodes` tokens.
            min_prob: Smallest path probability of a chain's tokens.
            top_logprobs: The target's best tokens at each of `tokens`, or at nodes of the last tree.

        Returns:
            The draft; its root alone where no source has a guess.

        Raises:
            UnknownSessionError: The service does not know the session, or no longer.
            ServiceUnavailableError: It does not answer.
            DraftServiceError: It refuses the step.
        """
        self._note(plain(tokens))
        if not self.alive and not self._client._silent:
            raise UnknownSessionError("The session is over.", "Open another one.")
        want = wire.Want(nodes=nodes, max_depth=max_depth, chain=chain, min_prob=min_prob)
        self._client._step([self], want, top_logprobs)
        failure = self.draft.error
        if failure is not None and not self._client._silent:
            raise error_of(failure.code, failure.message, failure.hint)
        return self.draft

    def close(self, *, finished: bool = True, tokens: Tokens = ()) -> None:
        """Ends the session. Further calls do nothing.

        Args:
            finished: Whether others may learn from it.
            tokens: Emitted since the last step.

        Raises:
            RetrievalDraftError: The call failed, and `on_error` is "raise"; not where the session is gone
                already.
        """
        self._note(plain(tokens))
        if not self.alive:
            return
        with suppress(UnknownSessionError):
            self._client._step([self], wire.Want(nodes=0), close="finished" if finished else "dropped")
        self._over = True

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.close(finished=kind is None)

    def _note(self, tokens: list[int]) -> None:
        """Adds tokens to those that are sent next."""
        self.draft = self._empty()
        self._fresh = len(tokens)
        if tokens:
            self._last = tokens[-1]
            self.length += len(tokens)
            self.draft = self._empty()
        if self.alive:
            self._pending = self._pending + tokens
            self._over = len(self._pending) > _MAX_PENDING

    def _take(self, draft: Draft) -> None:
        """Handles the service's answer."""
        if draft.error is None:
            self._pending = []
            if draft.tokens:
                self.draft = draft
            else:
                self.draft.accepted = draft.accepted
            return
        self.draft.error = draft.error
        self._fail(error_of(draft.error.code, draft.error.message))

    def _fail(self, error: RetrievalDraftError) -> None:
        if isinstance(error, DraftServiceError):
            # A refused token would be refused again with every later one.
            self._over = error.status < 500 and not isinstance(error, ServiceFullError)

    def _empty(self) -> Draft:
        return Draft(tokens=[self._last], parents=[-1], path_probs=[1.0], length=self.length)


def plain(tokens: Any) -> list[int]:
    """Token ids as a list of int; arrays and tensors of one axis too."""
    values = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
    try:
        return [int(value) for value in values]
    except TypeError as error:
        raise InvalidInputError(
            "Tokens are no row of ids.", "Pass a list, or an array of one axis."
        ) from error
