"""Messages between engines and the drafting service, as MessagePack or JSON.

Every message carries the version of this format, and is checked when it is read: types, ranges, lengths,
and the absence of unknown fields. Token ids travel as plain numbers, so that an engine in any
language needs nothing but a MessagePack library.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

__all__ = [
    "JSON",
    "MESSAGE_PACK",
    "VERSION",
    "Draft",
    "Failure",
    "Info",
    "OpenReply",
    "OpenRequest",
    "Step",
    "StepReply",
    "StepRequest",
    "TopLogprobs",
    "decode",
    "encode",
]

VERSION = 1
MESSAGE_PACK, JSON = "application/msgpack", "application/json"
MAX_STEPS = 1024
MAX_DRAFT_NODES = 1024
MAX_LENGTH = (1 << 31) - 1
MAX_TEXT = 1 << 21
"""Tokens of one list."""

MAX_TEXTS = 1024
"""References of one session."""

MAX_ROWS = 1 << 16
"""Rows of predictions in all steps of a request together."""

SMALL = 64 << 10
"""Largest size in bytes of a message that is decoded in one call."""

Token = Annotated[int, Meta(ge=0, le=MAX_LENGTH)]
Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Version = Literal[1]


class TopLogprobs(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The target's most probable next tokens at some positions.

    Attributes:
        tokens: One row for each position, best first; all rows of one length.
        probs: Their probabilities under the target's softmax.
        nodes: Nodes of the last tree that the rows belong to, 0 being its root; None where row i is the
            distribution that the i-th token of the step was drawn from.
    """

    tokens: Annotated[list[list[Token]], Meta(max_length=MAX_ROWS)]
    probs: Annotated[list[list[Probability]], Meta(max_length=MAX_ROWS)]
    nodes: list[Annotated[int, Meta(ge=0, le=MAX_DRAFT_NODES)]] | None = None


class Want(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Requested properties of a draft.

    Attributes:
        nodes: Draft nodes at most, the root not counted; 0 for none. Of a chain: its length at most.
        max_depth: Largest useful length of a path; None for any.
        chain: One path instead of a tree: the one with the most accepted tokens on average.
        min_prob: Smallest path probability of a chain's tokens.
        deepest: The former name of `max_depth`, still read.
        floor: The former name of `min_prob`, still read.
    """

    nodes: Annotated[int, Meta(ge=0, le=MAX_DRAFT_NODES)] = 60
    max_depth: Annotated[int, Meta(ge=0, le=MAX_LENGTH)] | None = None
    chain: bool = False
    min_prob: Probability = 0.0
    deepest: Annotated[int, Meta(ge=0, le=MAX_LENGTH)] | None = None
    floor: Probability | None = None

    def __post_init__(self) -> None:
        if self.deepest is not None:
            self.max_depth, self.deepest = self.deepest, None
        if self.floor is not None:
            self.min_prob, self.floor = self.floor, None


class OpenRequest(Want, kw_only=True):
    """Starts a session.

    Attributes:
        prompt: All of the text so far, one token at least.
        references: Texts that the reply may quote.
        share: Parts that other servers may learn: "none", "reply" or "all"; None for the service's default.
        fingerprint: Of the engine's tokenizer; another one than the service's is refused. Empty: not checked.
        version: Of this format.
    """

    prompt: Annotated[list[Token], Meta(min_length=1)]
    nodes: Annotated[int, Meta(ge=0, le=MAX_DRAFT_NODES)] = 0
    references: list[list[Token]] = []
    share: Literal["none", "reply", "all"] | None = None
    fingerprint: Annotated[str, Meta(max_length=64)] = ""
    version: Version = 1


class Step(Want, kw_only=True):
    """A step of a session: its emitted tokens, and the next draft that it wants.

    Attributes:
        session: Its name from the service.
        tokens: Emitted since the last step, in order, the bonus token included.
        at: Length of the text before `tokens`, as the engine has it. Tokens that the service has already are
            ignored, so a step whose answer was lost can be sent again; a gap is an error. None: not checked.
        top_logprobs: The target's best tokens, if the engine has them.
        said: The former name of `top_logprobs`, still read.
        close: Ends the session after `tokens`: "finished" lets others learn from it, "dropped" does not.
    """

    session: Annotated[str, Meta(max_length=64)]
    tokens: list[Token] = []
    at: Annotated[int, Meta(ge=0)] | None = None
    top_logprobs: TopLogprobs | None = None
    said: TopLogprobs | None = None
    close: Literal["finished", "dropped"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.said is not None:
            self.top_logprobs, self.said = self.said, None


class StepRequest(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Steps of many sessions at once, each session once."""

    steps: Annotated[list[Step], Meta(min_length=1, max_length=MAX_STEPS)]
    version: Version = 1


class Failure(Struct, omit_defaults=True):
    """An error, in the format of OpenAI's errors."""

    message: str
    type: str = "invalid_request_error"
    code: int = 400
    param: str | None = None
    hint: str = ""


class Draft(Struct, omit_defaults=True):
    """A draft to verify. Node 0 is the last token of the text; parents come before their children.

    Attributes:
        tokens: The root's, then those of the draft nodes, the most probable paths first.
        parents: Of each node; -1 for the root.
        path_probs: P(the node and all above it are accepted); 1 for the root.
        accepted: Number of the step's tokens that had been drafted, from the first on.
        length: Tokens of the text.
        error: Reason that there is no draft; None without an error.
    """

    tokens: list[int] = []
    parents: list[int] = []
    path_probs: list[float] = []
    accepted: int = 0
    length: int = 0
    error: Failure | None = None

    @property
    def num_draft_tokens(self) -> int:
        """Nodes, the root not included."""
        return max(0, len(self.tokens) - 1)


class OpenReply(Struct):
    """The session's name, and its first draft if one was requested."""

    session: str
    draft: Draft
    version: int = VERSION


class StepReply(Struct):
    """One draft for each step, in their order."""

    drafts: list[Draft]
    version: int = VERSION


class Info(Struct):
    """Description of the service.

    Attributes:
        vocabulary: Number of token ids.
        fingerprint: Of the tokenizer; empty where it has none.
        sessions: Open ones of the tenant.
        max_sessions: Open at once, of all tenants.
        max_session_tokens: Prompt, references and reply of one session.
        idle_seconds: A session that is not used for so long is closed.
        store: State of the store; empty without one.
    """

    vocabulary: int
    fingerprint: str
    sessions: int
    max_sessions: int
    max_session_tokens: int
    idle_seconds: float
    store: str = ""
    version: int = VERSION


class ErrorReply(Struct):
    """Answer to a request that failed as a whole."""

    error: Failure


Message = TypeVar("Message")
_packer, _writer = msgspec.msgpack.Encoder(), msgspec.json.Encoder()
_readers: dict[tuple[type, bool], Any] = {
    (kind, json): (msgspec.json.Decoder(kind) if json else msgspec.msgpack.Decoder(kind))
    for kind in (OpenRequest, StepRequest, OpenReply, StepReply, Info, ErrorReply)
    for json in (False, True)
}


def encode(message: Struct, json: bool = False) -> bytes:
    """A message as bytes."""
    return (_writer if json else _packer).encode(message)


def decode(body: bytes, kind: type[Message], json: bool = False) -> Message:
    """Reads and checks a message.

    Raises:
        msgspec.DecodeError: It is no MessagePack or JSON, or not such a message.
        RecursionError: It is nested too deeply.
    """
    if len(body) > SMALL and kind in _SENT:
        large: Message = _decode_large(body, kind, json)
        return large
    message: Message = _readers[kind, json].decode(body)
    return message


class _SentOpen(Want, kw_only=True):
    """An `OpenRequest` whose lists were left undecoded."""

    prompt: Raw
    references: Raw = msgspec.field(default_factory=Raw)
    nodes: Annotated[int, Meta(ge=0, le=MAX_DRAFT_NODES)] = 0
    share: Literal["none", "reply", "all"] | None = None
    fingerprint: Annotated[str, Meta(max_length=64)] = ""
    version: Version = 1


class _SentStep(Want, kw_only=True):
    """A `Step` whose lists were left undecoded."""

    session: Annotated[str, Meta(max_length=64)]
    tokens: Raw = msgspec.field(default_factory=Raw)
    at: Annotated[int, Meta(ge=0)] | None = None
    top_logprobs: Raw = msgspec.field(default_factory=Raw)
    said: Raw = msgspec.field(default_factory=Raw)
    close: Literal["finished", "dropped"] | None = None


class _SentSteps(Struct, forbid_unknown_fields=True, kw_only=True):
    """A `StepRequest` whose lists were left undecoded."""

    steps: Annotated[list[_SentStep], Meta(min_length=1, max_length=MAX_STEPS)]
    version: Version = 1


_SENT: dict[type, type] = {OpenRequest: _SentOpen, StepRequest: _SentSteps}
_Text = Annotated[list[Token], Meta(max_length=MAX_TEXT)]
_Texts = Annotated[list[Raw], Meta(max_length=MAX_TEXTS)]
_large: dict[tuple[Any, bool], Any] = {
    (kind, json): (msgspec.json.Decoder(kind) if json else msgspec.msgpack.Decoder(kind))
    for kind in (_SentOpen, _SentSteps, _Text, _Texts, TopLogprobs)
    for json in (False, True)
}


def _decode_large(body: bytes, kind: Any, json: bool) -> Any:
    """Reads a message list by list, each bounded before it is decoded, as each byte could become a list."""
    sent = _large[_SENT[kind], json].decode(body)
    if isinstance(sent, _SentOpen):
        texts = _list(sent.references, _Texts, MAX_TEXTS, json) if len(memoryview(sent.references)) else []
        return OpenRequest(
            **_rest(sent, "prompt", "references"),
            prompt=_list(sent.prompt, _Text, MAX_TEXT, json, least=1),
            references=[_list(text, _Text, MAX_TEXT, json) for text in texts],
        )
    steps, rows = [], 0
    for step in sent.steps:
        top_logprobs = None
        raw = step.top_logprobs if len(memoryview(step.top_logprobs)) else step.said
        if len(memoryview(raw)):
            if json and bytes(raw).count(b"[") > 2 * MAX_ROWS + 3:
                raise msgspec.ValidationError(f"`top_logprobs` has more than {MAX_ROWS} rows")
            top_logprobs = _large[TopLogprobs, json].decode(raw)
            rows += len(top_logprobs.tokens) + len(top_logprobs.probs)
            if rows > 2 * MAX_ROWS:
                raise msgspec.ValidationError(
                    f"`top_logprobs` has more than {MAX_ROWS} rows in all steps together"
                )
        tokens = _list(step.tokens, _Text, MAX_TEXT, json) if len(memoryview(step.tokens)) else []
        steps.append(
            Step(**_rest(step, "tokens", "top_logprobs", "said"), tokens=tokens, top_logprobs=top_logprobs)
        )
    return StepRequest(steps=steps, version=sent.version)


def _list(raw: Raw, kind: Any, most: int, json: bool, least: int = 0) -> Any:
    # MessagePack has the length before a list; JSON has to be counted.
    separators = b"[" if kind is _Texts else b","
    if json and bytes(raw).count(separators) > most:
        raise msgspec.ValidationError(f"Expected `array` of length <= {most}")
    made = _large[kind, json].decode(raw)
    if len(made) < least:
        raise msgspec.ValidationError(f"Expected `array` of length >= {least}")
    return made


def _rest(message: Struct, *without: str) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__ if name not in without}
