"""Fields of a slot, which holds one session: addresses and sizes of its arrays.

Invariants between steps, for each open slot:

    text[:LENGTH] is prompt and reply, text[:INSERTED] is in the automaton
    chain, longest and tail of the slot are those of the end of text[:LOCATED] in the segments of the table
    all three are equal, unless a step was interrupted: then the next one catches up
    nodes 0..PENDING-1 are the proposals for the present text; node 0 is its end, CHAIN of them the chain
"""

from __future__ import annotations

ID, TEXT, TEXT_ROOM, LENGTH, INSERTED, LOCATED = range(6)
STATES_AT, NUM_STATES, EDGES_AT, NUM_EDGES, TABLE_AT, TABLE_SIZE, META_AT = range(6, 13)
PENDING, STAMP, CHAIN = range(13, 16)
SLOT_FIELDS = 16

SLOT_BITS = 20
SLOT_MASK = (1 << SLOT_BITS) - 1
"""A session's id is its slot and, above, the number of sessions opened before it: no id is used twice."""

CLOSED = -1
