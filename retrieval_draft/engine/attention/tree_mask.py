"""Model inputs for a draft tree: tokens, positions and attention mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_draft._kernels.lazy import LazyKernels
from retrieval_draft.drafting.tree import DraftTree

__all__ = [
    "MOVES",
    "Mask",
    "TreeAttention",
    "TreeInputs",
    "Upload",
    "packed_words",
    "padded_size",
    "slots_of_moves",
]

Mask = Tensor | dict[str, Tensor | None] | None
"""A mask: None where every given key is visible; else additive, or one such mask for each layer type."""

kernels = LazyKernels("retrieval_draft.engine._kernels.tree_inputs")

_NO_WINDOW = 1 << 62
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48)

MOVES = 32
"""Slots of a path whose keys a captured pass may move before it reads them. Longer paths move before it."""


def padded_size(nodes: int) -> int:
    """The next of the few sizes that a tree has on CUDA: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ..."""
    return next((size for size in _SIZES if size >= nodes), -(-nodes // 32) * 32)


def packed_words(nodes: int) -> int:
    """Length of `TreeInputs.packed` for a padded tree: tokens, positions, depths, length, who sees whom."""
    return 3 * nodes + 1 + (0 if nodes == 1 else -(-nodes * nodes // 8))


def slots_of_moves(moved: NDArray[np.int64], first: int, kept: int) -> NDArray[np.int64]:
    """Slots of a path's keys, and those that they move to.

    Args:
        moved: int64, shape (m,). As for `SpeculativeCache.commit`.
        first: Committed tokens before the path.
        kept: As for `SpeculativeCache.commit`.

    Returns:
        int64, shape (2, m).
    """
    return np.stack([first + moved, np.arange(first + kept, first + kept + len(moved))])


class TreeInputs:
    """Arguments of one forward pass. They hold until the next `TreeAttention.prepare`.

    Args:
        input_ids: int64, shape (1, n).
        position_ids: int64, shape (1, n).
        attention_mask: As the attribute, or a function that makes it once it is asked for.
        moved: int64. The path indices given to `prepare`, on the device; None if there were none.
        packed: int64, shape (`packed_words(n)` or more,). What the rest is made of, on the device; for a tree
            alone then its words for draws, and 2 * `MOVES` slots as `slots_of_moves` has them, zero where
            none move. None on the host.

    Attributes:
        lane: The trees of all rows that were packed with it, and its lane among them; None for one alone.
        waiting: Tokens of the path before, of which the cache does not know yet.
        commit: Commits these, and moves their keys unless it is given that the pass itself does. A target
            that commits late calls it, by `settle`, before anything else is read or written in the cache.
            None where nothing waits.
    """

    __slots__ = ("_mask", "commit", "input_ids", "lane", "moved", "packed", "position_ids", "waiting")

    def __init__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Mask | Callable[[], Mask],
        moved: Tensor | None,
        packed: Tensor | None = None,
    ) -> None:
        self.input_ids, self.position_ids, self.moved = input_ids, position_ids, moved
        self._mask = attention_mask
        self.packed = packed
        self.lane: tuple[Any, int] | None = None
        self.waiting = 0
        self.commit: Callable[[bool], None] | None = None

    def settle(self, in_pass: bool = False) -> None:
        """Commits what waits, once.

        Args:
            in_pass: Whether the captured pass over this tree moves the keys, or has moved them.
        """
        if self.commit is not None:
            self.commit(in_pass)
        self.commit, self.waiting = None, 0

    @property
    def attention_mask(self) -> Mask:
        """None where every given key is visible; else additive, (1, 1, n, keys), or one for each layer type.

        A mask for a layer type may be None too.
        """
        if callable(self._mask):
            self._mask = self._mask()
        return self._mask


class _Mask:
    """The additive mask of one layer type, in a buffer that is zero except for the tree.

    Columns are the keys that the cache returns: committed ones first, then the nodes.
    """

    def __init__(self, window: int | None, dtype: torch.dtype, device: torch.device) -> None:
        self.window = window
        self.minimum = torch.finfo(dtype).min
        self.buffer = torch.zeros((0, 0), dtype=dtype, device=device)
        self.columns = torch.arange(0, device=device)
        # Rows, first and last column of the tree written last, and committed columns hidden last.
        self.written = (0, 0, 0)
        self.stale = 0

    def write(self, hidden: Tensor, depths: Tensor, max_depth: int, length: int) -> Tensor:
        """Returns the mask, shape (1, 1, n, keys).

        Args:
            hidden: bool, shape (n, n). [i, j] true where node i must not see node j.
            depths: int64, shape (n,).
            max_depth: The largest depth.
            length: Committed tokens.
        """
        nodes = len(depths)
        first = 0 if self.window is None else max(0, length - self.window + 1)
        begin = length - first
        self._reserve(nodes, begin + nodes)
        rows, left, right = self.written
        if left != begin:
            self.buffer[:rows, left:right].zero_()
        if self.window is not None:
            hidden = hidden | (depths[:, None] - depths[None, :] >= self.window)
            self._write_left(depths, max_depth, length - self.window - first, begin)
        block = self.buffer[:nodes, begin : begin + nodes]
        block.copy_(hidden)
        block.mul_(self.minimum)
        if left != begin:
            rows = right = 0
        self.written = (max(nodes, rows), begin, max(right, begin + nodes))
        return self.buffer[None, None, :nodes, : begin + nodes]

    def _write_left(self, depths: Tensor, max_depth: int, gone: int, begin: int) -> None:
        """Hides the committed keys that have left the window of a deep node."""
        width = min(begin, max(0, max_depth + gone + 1))
        if self.stale > width:
            self.buffer[:, width : self.stale].zero_()
        if width:
            part = self.buffer[: len(depths), :width]
            part.copy_(self.columns[None, :width] <= depths[:, None] + gone)
            part.mul_(self.minimum)
        self.stale = width

    def _reserve(self, rows: int, columns: int) -> None:
        have_rows, have_columns = self.buffer.shape
        if rows <= have_rows and columns <= have_columns:
            return
        shape = (max(rows, have_rows), have_columns if columns <= have_columns else columns * 5 // 4 + 256)
        # A multiple of 16 columns keeps every row aligned for the memory-efficient CUDA kernel.
        self.buffer = self.buffer.new_zeros((shape[0], -(-shape[1] // 16) * 16))
        self.columns = torch.arange(self.buffer.shape[1], device=self.buffer.device)
        self.written, self.stale = (0, 0, 0), 0


class _HostMask(_Mask):
    """The same in the host's memory: one call of a kernel, where torch needs ten of its own."""

    def __init__(self, window: int | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(window, dtype, device)
        self._integers = _INTEGERS[dtype.itemsize]
        self._least = int(torch.tensor(self.minimum, dtype=dtype, device=device).view(self._integers))

    def write_here(
        self, hidden: NDArray[np.bool_], depths: NDArray[np.int64], nodes: int, length: int
    ) -> Tensor:
        """As `write`, from arrays as `pack_tree` writes them."""
        window = _NO_WINDOW if self.window is None else self.window
        columns = min(length, window - 1) + nodes
        self._reserve(nodes, columns)
        kernels.write_mask(self._bits, self._least, hidden, depths, nodes, length, window, self._state)
        return self.buffer.as_strided((1, 1, nodes, columns), self._strides)

    def _reserve(self, rows: int, columns: int) -> None:
        buffer = self.buffer
        super()._reserve(rows, columns)
        if self.buffer is not buffer:
            self._strides = (self.buffer.numel(), self.buffer.numel(), self.buffer.shape[1], 1)
            self._bits = self.buffer.view(self._integers).numpy()
            self._state = np.zeros(4, np.int64)


class Upload:
    """Memory of the host that is copied to a device at once, from pinned memory on CUDA.

    Args:
        device: The device; the host itself for what a CPU does as a device does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_here = False
        self._host = torch.empty(0, dtype=torch.int64, device="cpu")
        self._up = torch.empty(0, dtype=torch.int64, device=device)
        self._views: dict[int, tuple[Tensor, ...]] = {}
        self._sent: torch.cuda.Event | None = None

    def _wait(self) -> None:
        """Waits until the host may write again."""
        if self._sent is not None and not self._sent.query():
            # A pass whose result was never read, as a probe's, may still wait for its copy.
            self._sent.synchronize()

    def _reserve(self, words: int) -> None:
        if words > len(self._host):
            size = max(1024, 2 * words)
            pinned = self.device.type == "cuda"
            self._host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=pinned)
            self._words = self._host.numpy()
            self._bytes = self._words.view(np.bool_)
            self._views = {}
            self._up = self._host if self._is_here else self._up.new_empty(size)

    def _send(self, words: int) -> Tensor:
        """One copy to the device."""
        up = self._up[:words]
        up.copy_(self._host[:words], non_blocking=True)
        if self.device.type == "cuda":
            if self._sent is None:
                self._sent = torch.cuda.Event()
            self._sent.record(torch.cuda.current_stream(self.device))
        return up


class TreeAttention(Upload):
    """Turns draft trees into arguments of the model's forward pass.

    On CUDA everything is copied to the device at once, from pinned memory, masks are made where a pass asks
    for them, and trees are padded to a few sizes: padded nodes have the root's position, are seen by no other
    node and never accepted. On a CPU
    kernels write what the model reads, and torch has next to nothing to do.

    Args:
        windows: Layer types of the model with their windows. With more than one, masks come as a
            dictionary.
        dtype: Of the masks; the model's.
        device: Device of the model's inputs.
        sizes: Sizes of trees, ascending, in place of `padded_size` as far as they go. With them a CPU does
            all as a device does.
    """

    def __init__(
        self,
        windows: dict[str, int | None],
        dtype: torch.dtype,
        device: torch.device,
        sizes: Sequence[int] = (),
    ) -> None:
        super().__init__(device)
        self.pads = device.type == "cuda" or bool(sizes)
        self._sizes = sizes
        self._is_here = device.type == "cpu" and not sizes
        mask: Any = _HostMask if self._is_here else _Mask
        self._masks = {kind: mask(window, dtype, device) for kind, window in windows.items()}

    def size(self, nodes: int) -> int:
        """Nodes that a tree of `nodes` has when it is forwarded, the root included."""
        if not self.pads:
            return nodes
        return next((size for size in self._sizes if size >= nodes), padded_size(nodes))

    def prepare(
        self,
        tree: DraftTree,
        length: int,
        moved: NDArray[np.int64] | None = None,
        shift: int = 0,
        moves: NDArray[np.int64] | None = None,
        draws: NDArray[np.int64] | None = None,
    ) -> TreeInputs:
        """Arguments for a forward pass over `tree` after `length` committed tokens.

        Args:
            tree: The tree to verify, the root included.
            length: Committed tokens.
            moved: int64, shape (m,). Indices for `SpeculativeCache.commit`, copied to the device with the
                tree.
            shift: The root's position, less `length`.
            moves: int64, shape (2, m). Slots of at most `MOVES` keys that a captured pass moves; None for
                none.
            draws: int64, shape (words,). For draws at the nodes (`DrawWords`), copied with the tree; not
                where the host reads what it writes.
        """
        nodes = self.size(len(tree))
        self._wait()
        extra = 0 if moved is None else len(moved)
        words = packed_words(nodes)
        end = words if draws is None else words + len(draws)
        after = end + 2 * MOVES
        self._reserve(after + extra)
        hidden = self._bytes[8 * (3 * nodes + 1) :]
        max_depth = kernels.pack_tree(
            tree.tokens, tree.parents, tree.depths, length + shift, nodes, self._words, hidden
        )
        if self._is_here:
            return self._inputs_here(hidden, nodes, moved, length)
        self._words[3 * nodes] = length
        if draws is not None:
            self._words[words:end] = draws
        self._words[end:after] = 0
        if moves is not None:
            self._words[end:after].reshape(2, MOVES)[:, : moves.shape[1]] = moves
        if moved is not None:
            self._words[after : after + extra] = moved
        return self.unpack(self._send(after + extra), nodes, extra, max_depth, length)

    def _inputs_here(
        self, hidden: NDArray[np.bool_], nodes: int, moved: NDArray[np.int64] | None, length: int
    ) -> TreeInputs:
        if nodes not in self._views:
            self._views[nodes] = self._host[: 2 * nodes].view(2, 1, nodes).unbind()
        ids, positions = self._views[nodes]
        depths = self._words[2 * nodes :]
        masks: dict[str, Tensor | None] = {
            kind: mask.write_here(hidden, depths, nodes, length) if nodes > 1 else None
            for kind, mask in self._masks.items()
        }
        return TreeInputs(ids, positions, _alone(masks), None if moved is None else torch.from_numpy(moved))

    def unpack(self, up: Tensor, nodes: int, extra: int, max_depth: int, length: int) -> TreeInputs:
        """The device's half of `prepare`: views of `up`, and masks once they are asked for.

        Args:
            up: int64, shape (words,). `packed_words`, words for draws, slots that move, if any may, and path
                indices, on the device.
            nodes: Nodes of the padded tree.
            extra: Number of path indices.
            max_depth: Largest depth of a node.
            length: Committed tokens.
        """
        ids, positions, depths = up[: 3 * nodes].view(3, 1, nodes)
        packed = up[: len(up) - extra]

        def masks() -> Mask:
            made: dict[str, Tensor | None] = dict.fromkeys(self._masks)
            if nodes > 1:
                hidden = packed[3 * nodes + 1 :].view(torch.bool)[: nodes * nodes].view(nodes, nodes)
                for kind, mask in self._masks.items():
                    made[kind] = mask.write(hidden, depths[0], max_depth, length)
            return _alone(made)

        moved = up[len(packed) :][:extra] if extra else None
        return TreeInputs(ids, positions, masks, moved, packed)


def _alone(masks: dict[str, Tensor | None]) -> Mask:
    """The mask itself where all layers are of one type."""
    return masks if len(masks) > 1 else next(iter(masks.values()), None)
