"""The way in which a model verifies drafts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Verification", "Way"]

Way = Literal["tree", "chain", "plain"]


@dataclass(frozen=True, slots=True)
class Verification:
    """The way in which a model verifies drafts, as tried on the model itself.

    Attributes:
        way: "tree" for several guesses in one pass, "chain" for one path, "plain" for no drafts: the text is
            then that of `model.generate`.
        reason: The cause, as far as it is not the first of them.
    """

    way: Way
    reason: str
