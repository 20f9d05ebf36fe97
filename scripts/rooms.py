"""Prints the rooms of the package (its top-level modules and packages), the arrows between them, and circles.

    python scripts/rooms.py [--arrows]

Exits with 1 if there is a circle, or more than 26 rooms. Imports for type checking alone are not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict

import grimp

PACKAGE = "retrieval_draft"
MAX_ROOMS = 26


def room_of(module: str) -> str:
    """The top-level module or package that `module` lies in; the package's own name for its `__init__`."""
    return module.split(".")[1] if "." in module else PACKAGE


def rooms_and_arrows() -> tuple[list[str], dict[str, set[str]]]:
    """All rooms, and for each the rooms that it imports."""
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True)
    arrows: dict[str, set[str]] = defaultdict(set)
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            one, two = room_of(module), room_of(other)
            if one != two and PACKAGE not in (one, two):
                arrows[one].add(two)
    return sorted({room_of(module) for module in graph.modules} - {PACKAGE}), arrows


def floors(rooms: list[str], arrows: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by height, one floor above the highest room that each imports; rooms in circles are left out."""
    height: list[list[str]] = []
    left = set(rooms)
    while left:
        floor = sorted(room for room in left if not arrows[room] & left)
        if not floor:
            break
        height.append(floor)
        left -= set(floor)
    return height


def main() -> int:
    """Prints what was found; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arrows", action="store_true", help="list what each room imports")
    options = parser.parse_args()
    rooms, arrows = rooms_and_arrows()
    height = floors(rooms, arrows)
    for number, floor in enumerate(height):
        print(f"{number:2}  {', '.join(floor)}")
    circle = sorted(set(rooms) - {room for floor in height for room in floor})
    if options.arrows:
        for room in rooms:
            print(f"{room} -> {', '.join(sorted(arrows[room])) or '-'}")
    print(
        f"{len(rooms)} rooms, {len(height)} floors, {sum(map(len, arrows.values()))} arrows, "
        f"{'no circle' if not circle else 'in circles: ' + ', '.join(circle)}"
    )
    return int(bool(circle) or len(rooms) > MAX_ROOMS)


if __name__ == "__main__":
    sys.exit(main())
