"""Blocks of tokens: shared beginnings, ends that grow, and the oldest ends out first."""

from __future__ import annotations

import random

from retrieval_draft.engine.cache.prefix_tree import Block, PrefixTree, common_length
from tests.support.tokens import ids


def keep(tree: PrefixTree, text: list[int], key: str = "") -> Block:
    """Adds a text as the prefix cache does; the last block."""
    block = tree.root(key)
    for at in range(0, len(text), tree.size):
        tokens = ids(*text[at : at + tree.size])
        child, common = tree.child(block, tokens)
        if child is None or common < min(len(tokens), len(child.tokens)):
            child = tree.add(block, tokens, None)
        elif common < len(tokens):
            tree.extend(child, tokens)
        tree.touch(child)
        block = child
    return block


def known(tree: PrefixTree, text: list[int], key: str = "") -> int:
    return sum(common for _, common in tree.path(key, ids(*text)))


def test_texts_share_their_beginning() -> None:
    tree = PrefixTree(2)
    one, other = keep(tree, [0, 1, 2]), keep(tree, [0, 1, 3, 4])
    assert one is not other
    assert one.parent is other.parent
    assert [known(tree, text) for text in ([0, 1, 3, 4, 5], [0, 1, 3, 9], [0, 9], [9], [0, 1, 2])] == [
        4,
        3,
        1,
        0,
        3,
    ]
    assert known(tree, [0, 1], key="another tenant") == 0


def test_an_end_grows_in_its_own_block() -> None:
    tree = PrefixTree(4)
    assert keep(tree, [0, 1]) is keep(tree, [0, 1, 2, 3])
    assert keep(tree, [0, 1, 2, 3, 4]).parent is keep(tree, [0, 1, 2, 3])
    assert keep(tree, [0]) is keep(tree, [0, 1, 2, 3]), "a beginning of a block is in it"
    assert known(tree, [0, 1, 2, 3, 4, 5]) == 5


def test_the_end_used_longest_ago_goes_first() -> None:
    tree = PrefixTree(2)
    old, new = keep(tree, [0, 1, 2, 3]), keep(tree, [5, 6, 7])
    for block, _ in tree.path("", ids(0, 1, 2, 3)):
        tree.touch(block)
    assert tree.remove_oldest() is new
    assert new.is_out
    old.pins += 1
    removed = tree.remove_oldest()
    assert removed is not None
    assert removed.tokens.tolist() == [5, 6]
    assert tree.remove_oldest() is None, "what is in use stays"
    old.pins -= 1
    assert tree.remove_oldest() is old
    assert known(tree, [0, 1, 2]) == 2
    assert tree.remove_oldest() is not None
    assert tree.remove_oldest() is None
    assert known(tree, [0, 1]) == 0


def test_as_by_brute_force() -> None:
    draw = random.Random(3)
    for size in (1, 2, 3, 8):
        tree, texts = PrefixTree(size), []
        for _ in range(60):
            text = [draw.randrange(2) for _ in range(draw.randint(1, 12))]
            expected = max((common_length(ids(*text), ids(*each)) for each in texts), default=0)
            # Of blocks that begin alike, an equal one is preferred to none: never more than is there.
            assert known(tree, text) == expected
            keep(tree, text)
            texts.append(text)
        blocks = len(tree.clear())
        assert 0 < blocks <= sum(-(-len(text) // size) for text in texts)
        assert known(tree, texts[0]) == 0
