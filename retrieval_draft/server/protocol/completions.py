"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.protocol.generation import GenerationFields

__all__ = ["CompletionRequest"]

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    """A text to continue.

    Attributes:
        prompt: A text, texts, token ids, or lists of those.
        max_tokens: Of the reply.
        echo: Whether the response begins with the prompt.
        logprobs: How many alternatives of each token to name, with log probabilities.
        best_of: Samples to draw, of which the `n` most probable are returned.
        suffix: Not supported.
    """

    prompt: str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which makes sense with echo only")
        return self

    def check(self) -> None:
        """Refuses what cannot be done.

        Raises:
            ApiError: Names the field.
        """
        self.refuse("suffix")
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise ApiError(400, f"best_of is {self.best_of}; it must be at least n.", "best_of")
            if self.stream and self.best_of > (self.n or 1):
                raise ApiError(400, "The best samples are known at the end only; do not stream.", "best_of")
            if self.best_of > 1 and self.temperature is not None and self.temperature < 1e-5:
                raise ApiError(400, "Greedy decoding has one sample; set a temperature.", "best_of")

    @property
    def prompts(self) -> list[Any]:
        """One text or list of ids for each prompt."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
