"""Fields that completions and chat completions share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from retrieval_draft.server.errors import ApiError

__all__ = ["ContentPart", "GenerationFields", "Prediction", "StreamOptions", "text_of"]

Number = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
_UNSUPPORTED = "is not supported by this server"


class _Open(BaseModel):
    """A part of a request; unknown fields are let through, as OpenAI's clients grow."""

    model_config = ConfigDict(extra="allow")


class ContentPart(_Open):
    """A part of a message; only text is understood."""

    type: str
    text: str | None = None


class Prediction(_Open):
    """What the reply may look like."""

    type: Literal["content"] = "content"
    content: str | list[ContentPart]


class StreamOptions(_Open):
    """How to stream."""

    include_usage: bool = False


class GenerationFields(_Open):
    """Sampling, limits and extensions.

    Attributes:
        model: The served model's name.
        temperature: 0 is greedy; None for the model's own default, or 1.
        top_p: Nucleus sampling.
        top_k: Extension: most probable tokens to sample from; 0 for all.
        min_p: Extension: least probability, relative to the best token's.
        repetition_penalty: Extension, as of transformers.
        presence_penalty: Taken off tokens that the reply holds.
        frequency_penalty: Taken off them for each time.
        logit_bias: Added to the logits of tokens, by id.
        seed: The same seed gives the same reply.
        stop: Strings at which the reply ends.
        n: Choices.
        stream: Whether tokens are sent as they come.
        stream_options: How.
        user: Ignored.
        prediction: What the reply may look like; a draft source of this request.
        documents: Extension: texts that the reply may quote; draft sources of this request.
        share: Extension: what other servers may learn of this request.
        metrics: Extension: whether the response says what drafting did.
        draft_marks: Extension: whether each piece of a stream says which of its text was drafted.
        return_token_ids: Extension: whether the response has the token ids.
        ignore_eos: Extension: whether the reply goes on to its longest.
    """

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    logit_bias: (
        dict[
            Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")],
            Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)],
        ]
        | None
    ) = Field(None, max_length=1024)
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    prediction: Prediction | None = None
    documents: str | Annotated[list[str], Field(max_length=64)] | None = None
    share: Literal["none", "reply", "all"] | None = None
    metrics: bool | None = None
    draft_marks: bool | None = None
    return_token_ids: bool | None = None
    ignore_eos: bool | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def predicted(self) -> str | None:
        """The prediction's text."""
        return None if self.prediction is None else text_of(self.prediction.content, "prediction")

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self, top_k: int | None) -> dict[str, Any]:
        """Keyword arguments for `RetrievalDrafter.generate` that say the same.

        Args:
            top_k: Of the model's own generation configuration.
        """
        wanted: dict[str, Any] = {"do_sample": self.temperature is None or self.temperature >= 1e-5}
        if wanted["do_sample"]:
            wanted |= {"temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p}
            # transformers would take 50 where nobody says anything.
            wanted["top_k"] = max(self.top_k if self.top_k is not None else top_k or 0, 0)
        wanted["repetition_penalty"] = self.repetition_penalty
        if self.logit_bias:
            wanted["sequence_bias"] = {(int(token),): bias for token, bias in self.logit_bias.items()}
        return {name: value for name, value in wanted.items() if value is not None}

    def refuse(self, *names: str) -> None:
        """Refuses fields that would change the reply if they were understood.

        Raises:
            ApiError: One of them is set.
        """
        for name in names:
            value = getattr(self, name, None)
            if value is not None and value is not False and value != [] and value != {}:
                raise ApiError(400, f"{name} {_UNSUPPORTED}; leave it out.", name)


def text_of(content: str | list[ContentPart] | None, param: str) -> str:
    """The text of a message's content.

    Raises:
        ApiError: A part is no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in ("text", "input_text", "refusal") or part.text is None:
            raise ApiError(400, f"A content part of type {part.type!r} {_UNSUPPORTED}; use text.", param)
    return "".join(part.text or "" for part in content)
