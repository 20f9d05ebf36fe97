"""Errors between an engine and the drafting service.

RetrievalDraftError
  DraftServiceError                          refused by the service; `status` is the HTTP status
    UnknownSessionError(LookupError)         404: closed, expired, of another tenant, or never open
    OutOfStepError                           409: the engine's text is not the one that the service has
    ServiceFullError                         429: too many sessions or tokens
    NotAllowedError(PermissionError)         401: no key, or a wrong one
  ServiceUnavailableError(ConnectionError)   no answer, in time or at all
"""

from __future__ import annotations

from retrieval_draft.errors import RetrievalDraftError

__all__ = [
    "DraftServiceError",
    "NotAllowedError",
    "OutOfStepError",
    "ServiceFullError",
    "ServiceUnavailableError",
    "UnknownSessionError",
    "error_of",
]


class DraftServiceError(RetrievalDraftError):
    """The service refused a request."""

    status = 400


class UnknownSessionError(DraftServiceError, LookupError):
    """No such session: closed, expired, of another tenant, or never open."""

    status = 404


class OutOfStepError(DraftServiceError):
    """The engine's text is not the one that the service has, or its tokenizer is another."""

    status = 409


class TooLargeError(DraftServiceError):
    """The body or the session's text is too long."""

    status = 413


class ServiceFullError(DraftServiceError):
    """Too many sessions or tokens are open."""

    status = 429


class NotAllowedError(DraftServiceError, PermissionError):
    """No API key, or a wrong one."""

    status = 401


class ServiceUnavailableError(RetrievalDraftError, ConnectionError):
    """No answer, in time or at all."""


_BY_STATUS = {each.status: each for each in DraftServiceError.__subclasses__()}


def error_of(status: int, message: str, hint: str = "") -> DraftServiceError:
    """The error of an HTTP status."""
    error = _BY_STATUS.get(status, DraftServiceError)(message, hint)
    error.status = status
    return error
