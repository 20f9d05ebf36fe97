"""Errors that this package raises on purpose.

RetrievalDraftError
  InvalidInputError(ValueError)          a prompt, a length or an option that cannot be used
    UnknownMethodError                   no drafting method of that name
  TokenizerMismatchError(ValueError)     tokenizer and model (or datastore) do not belong together
  UnsupportedModelError(ValueError)      its cache cannot be rolled back, or masks are ignored
  UnsupportedGenerationError(ValueError) a generation mode that is not supported (beams, ...)
  UnsupportedEngineError(RuntimeError)   transformers or an engine in a version whose interface is not known
  NonFiniteLogitsError(ArithmeticError)  the model returned NaN, or a score to draw by is infinite
  ModelFileError(OSError)                a model file is missing, torn or foreign
  DatastoreError(OSError)                a datastore's file is missing, torn, foreign or in use

Messages name the failure, the found and the allowed value, and a remedy.
"""

from __future__ import annotations

__all__ = [
    "DatastoreError",
    "InvalidInputError",
    "ModelFileError",
    "NonFiniteLogitsError",
    "RetrievalDraftError",
    "TokenizerMismatchError",
    "UnknownMethodError",
    "UnsupportedEngineError",
    "UnsupportedGenerationError",
    "UnsupportedModelError",
]


class RetrievalDraftError(Exception):
    """Base of all errors raised on purpose by this package.

    Args:
        message: The failure, the found and the allowed value.
        hint: A remedy. The command line prints it on its own line.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".rstrip())
        self.message = message
        self.hint = hint


class InvalidInputError(RetrievalDraftError, ValueError):
    """A prompt, a length or an option that cannot be used."""


class UnknownMethodError(InvalidInputError):
    """No drafting method of that name."""


class TokenizerMismatchError(RetrievalDraftError, ValueError):
    """Tokenizer and model, or tokenizer and datastore, do not belong together."""


class UnsupportedModelError(RetrievalDraftError, ValueError):
    """The model's cache cannot be rolled back, or its attention would ignore the tree mask."""


class UnsupportedGenerationError(RetrievalDraftError, ValueError):
    """A generation mode that drafted decoding does not support."""


class UnsupportedEngineError(RetrievalDraftError, RuntimeError):
    """transformers is too old, or an engine calls draft plug-ins through an unknown interface."""


class NonFiniteLogitsError(RetrievalDraftError, ArithmeticError):
    """The model returned NaN, or a score to draw by is infinite: there is no next token to choose."""


class ModelFileError(RetrievalDraftError, OSError):
    """A model file is missing, torn or foreign."""


class DatastoreError(RetrievalDraftError, OSError):
    """A datastore's file or folder is missing, torn, foreign, of a newer format, or in use by another."""
