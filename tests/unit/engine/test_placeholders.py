"""Ids that stand for images, and the text between them."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import LlamaConfig

from retrieval_draft.engine.placeholders import placeholder_ids, takes_media, text_runs
from tests.support.image_models import CLASSES, IMAGE, MARKS, make_image_model
from tests.support.models import make


@pytest.mark.parametrize(
    ("tokens", "runs"),
    [
        ([5, 6, 99, 99, 7, 99], [[5, 6], [7], []]),
        ([99, 98, 5], [[], [5]]),
        ([5, 6], [[5, 6]]),
        ([], [[]]),
        ([99], [[], []]),
    ],
)
def test_text_between_placeholders(tokens: list[int], runs: list[list[int]]) -> None:
    found = text_runs(np.array(tokens, np.int32), frozenset({98, 99}))
    assert [run.tolist() for run in found] == runs


def test_a_text_without_placeholders_is_itself() -> None:
    tokens = np.array([1, 2], np.int32)
    assert text_runs(tokens, frozenset())[0] is tokens


def test_ids_of_images_are_told_from_those_of_text() -> None:
    assert placeholder_ids(CLASSES["qwen3_vl"][1]()) == {IMAGE, *MARKS}
    assert placeholder_ids(CLASSES["idefics3"][1]()) == {IMAGE}
    assert placeholder_ids(LlamaConfig(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=4)) == set()

    config = CLASSES["idefics3"][1]()
    config.image_token_id = 1 << 40
    assert placeholder_ids(config) == set()  # no text of int32 ids holds it


def test_models_that_read_images_are_told_from_those_of_text() -> None:
    assert takes_media(make_image_model("llava"))
    assert not takes_media(make("llama"))
    assert not takes_media(make("gemma3"))
