"""What threads execute, estimated from a listing of instructions (:attr:`benchmarks.compiled.Launch.listing`).

Nothing is run. Loops are backward branches; how often they go round is known from the bytes that one round moves, and
everything outside of them is counted along the longest way through it, so that alternatives count once, the longest
one. Subroutines (the slow ways of divisions and square roots) are not followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Listing = list[tuple[int, str]]

_BRANCH = re.compile(r"^(@\S+ )?BRA\b.*?0x([0-9a-f]+)$")
_ACCESS = re.compile(r"^(?:@\S+ )?(LDG|STG|LDGSTS)((?:\.\w+)*)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, and the bytes that one round of it loads from and stores to global memory.

    Bytes are those of 16-byte accesses where there are any, for others are of parameters, else all.
    """

    instructions: int
    wide: int
    loaded: int
    stored: int


def _accesses(texts: Iterable[str]) -> list[tuple[bool, int]]:
    """(is a store, bytes) of every access to global memory."""
    found = []
    for text in texts:
        if match := _ACCESS.match(text):
            widths = [_WIDTHS[part] for part in match[2].split(".") if part in _WIDTHS]
            found.append((match[1] == "STG", widths[0] if widths else 4))
    return found


def _spans(listing: Listing) -> list[tuple[int, int]]:
    """First and last address of every loop, by its first."""
    found = []
    for address, text in listing:
        if (match := _BRANCH.match(text)) and (target := int(match[2], 16)) < address:
            found.append((target, address))
    return sorted(found)


def loops(listing: Listing) -> list[Loop]:
    """The innermost loops that touch global memory, in order."""
    spans = _spans(listing)
    found = []
    for first, last in spans:
        if any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            continue
        texts = [text for address, text in listing if first <= address <= last]
        accesses = _accesses(texts)
        wide = [access for access in accesses if access[1] == 16]
        chosen = wide or accesses
        loaded, stored = (sum(size for is_store, size in chosen if is_store is kind) for kind in (False, True))
        if chosen:
            found.append(Loop(len(texts), len(wide), loaded, stored))
    return found


def outside(listing: Listing) -> int:
    """Instructions outside of loops on the longest way from the first to an exit."""
    spans = _spans(listing)
    place = {address: i for i, (address, _) in enumerate(listing)}
    longest = [0] * (len(listing) + 1)
    for i in reversed(range(len(listing))):
        address, text = listing[i]
        ways = [longest[i + 1]]
        if match := _BRANCH.match(text):
            target = int(match[2], 16)
            if text == f"BRA 0x{match[2]}":
                ways = [0]
            if target > address:
                ways.append(longest[place.get(target, len(listing))])
        elif text.startswith(("EXIT", "RET")):
            ways = [0]
        longest[i] = max(ways) + (not any(first <= address <= last for first, last in spans))
    return longest[0]


def around(listing: Listing) -> int:
    """Instructions in loops that hold other loops, without those."""
    spans = _spans(listing)
    inner = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]

    def is_in(address: int, places: list[tuple[int, int]]) -> bool:
        return any(first <= address <= last for first, last in places)

    return sum(is_in(address, spans) and not is_in(address, inner) for address, _ in listing)


def per_element(
    listing: Listing, threads: int, numel: int, bytes_per_element: float, passes: int = 1, turns: int = 0
) -> float:
    """Instructions of all threads for one of `numel` elements.

    Args:
        bytes_per_element: what the kernel moves for an element, and so a round of its loop.
        passes: 2 where a loop that only loads goes over all elements before the one that stores does.
        turns: how often a thread goes round the loops that hold other loops.
    """
    found = loops(listing)
    once = (outside(listing) + turns * around(listing)) * threads / numel
    if not found:
        return once

    def busiest(candidates: list[Loop]) -> Loop:
        # The first of equal ones: later ones are for what is rare.
        return max(candidates, key=lambda loop: (loop.wide, loop.loaded + loop.stored))

    main = busiest([loop for loop in found if loop.stored] or found)
    total = main.instructions / ((main.loaded + main.stored) / bytes_per_element)
    if passes == 2:
        first = busiest([loop for loop in found if not loop.stored])
        # It loads what the other loop loads and stores.
        total += first.instructions / (first.loaded / (bytes_per_element / 2))
    return once + total
