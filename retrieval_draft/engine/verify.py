"""Acceptance: the path of the target's own choices through a verified tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from retrieval_draft.drafting.tree import DraftTree

__all__ = ["walk"]


def walk(tree: DraftTree, choose: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Follows the target's own choices down the tree, in one pass over its nodes.

    Lazy: a caller that stops taking tokens leaves the remaining nodes unasked, as plain decoding
    would. Each token may be used before the next one is chosen.

    Args:
        tree: The verified tree.
        choose: The target's next token after a node. Asked once for each accepted node.

    Yields:
        An accepted node, the root first, and the token chosen after it. The last token, for
        which the tree has no node, is the bonus token.

    Example:
        tokens [8, 9, 4, 3], parents [-1, 0, 1, 0], choices 9, 5  ->  (0, 9), (1, 5)
    """
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    last, node, size = 0, 1, len(tokens)
    while True:
        wanted = choose(last)
        yield last, wanted
        # Children come after their parent and siblings differ, so one forward scan finds every accepted
        # child.
        while node < size and (parents[node] != last or tokens[node] != wanted):
            node += 1
        if node == size:
            return
        last, node = node, node + 1
