import torch

from retrieval_draft.cli._draft_streamer import DraftStreamer
from tests.support.tiny import byte_tokenizer

PROMPT = torch.tensor([[1, 2, 3]])


def stream(text: str, steps: list[int]) -> tuple[DraftStreamer, list[tuple[str, bool]]]:
    """Streams the bytes of `text`, `steps[i]` of them from step i."""
    tokenizer = byte_tokenizer()
    pieces: list[tuple[str, bool]] = []
    streamer = DraftStreamer(tokenizer, lambda piece, drafted: pieces.append((piece, drafted)))
    tokens = tokenizer(text)["input_ids"]
    assert sum(steps) == len(tokens)
    streamer.put(PROMPT)
    for size in steps:
        streamer.step()
        for token in tokens[:size]:
            streamer.put(torch.tensor([token]))
        tokens = tokens[size:]
    streamer.end()
    return streamer, pieces


def test_all_but_the_last_token_of_a_step_were_drafts() -> None:
    streamer, pieces = stream("abcdef", [1, 3, 2])
    assert pieces == [("a", False), ("b", True), ("c", True), ("d", False), ("e", True), ("f", False)]
    assert streamer.drafted == [False, True, True, False, True, False]
    assert streamer.text == "abcdef"


def test_the_prompt_is_not_text() -> None:
    assert stream("", [])[0].text == ""


def test_a_character_of_several_tokens_comes_whole() -> None:
    streamer, pieces = stream("a\u20acb", [1, 2, 2])
    assert streamer.text == "a\u20acb"
    assert [piece for piece, _ in pieces] == ["a", "\u20ac", "b"]


def test_a_character_that_never_ends_is_shown_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    streamer = DraftStreamer(tokenizer)
    streamer.put(PROMPT)
    for token in tokenizer("a\u20ac")["input_ids"][:-1]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert streamer.text == "a\ufffd"


def test_tokens_may_come_several_at_once() -> None:
    tokenizer = byte_tokenizer()
    streamer = DraftStreamer(tokenizer)
    streamer.put(PROMPT)
    streamer.put(torch.tensor(tokenizer("abc")["input_ids"]))
    streamer.end()
    assert streamer.text == "abc"
    assert streamer.drafted == [True, True, False]
