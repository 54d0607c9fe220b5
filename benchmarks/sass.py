"""What threads execute, estimated from a listing of instructions (:func:`listing`).

Nothing is run. Loops are backward branches; how often they go round is known from the bytes that one round moves, and
everything outside of them is counted along the longest way through it, so that alternatives count once, the longest
one. A round of a loop is the way through it with the most 16-byte accesses; of ways that tie, the one with the fewest
calls and float64 instructions, which are for what is rare, and then the longest. Branches that a launch's parameters
decide go where they go (:mod:`benchmarks.uniform`). Subroutines (the slow ways of divisions and square roots) are not
followed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Listing = list[tuple[int, str]]
#: Address of a conditional branch -> whether it is taken.
Decided = Mapping[int, bool]

_BRANCH = re.compile(r"^(@\S+ )?BRA\b.*?0x([0-9a-f]+)$")
_ACCESS = re.compile(r"^(?:@\S+ )?(LDG|STG|LDGSTS)((?:\.\w+)*)")
_CALL = re.compile(r"^(?:@\S+ )?CALL\b.*?0x([0-9a-f]+)$")
_STACK = re.compile(r"^(?:@\S+ )?(?:STL|LDL)\b")
_RARE = re.compile(r"^(?:@\S+ )?(?:CALL|D(?:ADD|MUL|FMA|SETP|MNMX)\b|MUFU\.\w*64H)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def listing(text: str) -> Listing:
    """Address and text of the instructions of one function that ``cuobjdump -sass`` printed, without the padding."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)
    return [(int(address, 16), text.strip()) for address, text in found if not text.startswith("NOP")]


@dataclass(frozen=True)
class Loop:
    """A loop: the instructions of one round of it, and the bytes that this loads from and stores to global memory.

    Bytes are those of 16-byte accesses where there are any, for others are of parameters, else all; for loads and
    stores each.
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


class _Code:
    """A listing as a graph whose ways only go forward."""

    def __init__(self, code: Listing, decided: Decided) -> None:
        self.code = code
        self.place = {address: i for i, (address, _) in enumerate(code)}
        self.next: list[list[int]] = []
        for i, (address, text) in enumerate(code):
            match = _BRANCH.match(text)
            taken = decided.get(address)
            ways = [] if taken else [i + 1]
            if (match and text == f"BRA 0x{match[2]}") or text.startswith(("EXIT", "RET")):
                ways = []
            if match and taken is not False and (target := int(match[2], 16)) > address:
                ways.append(self.place.get(target, len(code)))
            self.next.append(ways)
        self.spans = self._spans(decided)
        self.inner = [span for span in self.spans if not self.held(span)]

    def _spans(self, decided: Decided) -> list[tuple[int, int]]:
        """First and last address of every loop, by its first.

        Code that was moved behind the end, and goes back to where it came from, is none: what it goes back to does not
        lead to it.
        """
        found = []
        for address, text in self.code:
            match = _BRANCH.match(text)
            if match is None or (target := int(match[2], 16)) >= address or decided.get(address) is False:
                continue
            if self._leads(self.place[target], self.place[address]):
                found.append((target, address))
        return sorted(found)

    def _leads(self, first: int, last: int) -> bool:
        reached = {first}
        for i in range(first, last):
            if i in reached:
                reached.update(self.next[i])
        return last in reached

    def held(self, span: tuple[int, int]) -> list[tuple[int, int]]:
        """The loops in a loop."""
        return [(a, b) for a, b in self.spans if (a, b) != span and span[0] <= a and b <= span[1]]

    def way(
        self, first: int, last: int, key: Callable[[str], tuple[int, ...]], left_out: Iterable[tuple[int, int]]
    ) -> tuple[tuple[int, ...], list[int]] | None:
        """The way from place `first` to `last`, or to an exit where that is the end, with the largest sum of keys.

        (sum, places on it), or None where there is no way. Instructions of the loops `left_out` are not counted.
        """
        skipped = list(left_out)
        at_end = last == len(self.code)
        best: dict[int, tuple[tuple[int, ...], int | None]] = {}
        for i in reversed(range(first, min(last + 1, len(self.code)))):
            address, text = self.code[i]
            ways = [(best[j][0], j) for j in self.next[i] if j in best] if i != last else []
            if not ways and i != last and not (at_end and all(j >= len(self.code) for j in self.next[i])):
                continue
            total, following = max(ways, key=lambda way: way[0]) if ways else (None, None)
            own = key(text)
            if any(a <= address <= b for a, b in skipped):
                own = tuple(0 for _ in own)
            best[i] = tuple(a + b for a, b in zip(own, total or own, strict=True)) if total else own, following
        if first not in best:
            return None
        places, at = [], first
        while at is not None:
            if not any(a <= self.code[at][0] <= b for a, b in skipped):
                places.append(at)
            at = best[at][1]
        return best[first][0], places


def _busy(text: str) -> tuple[int, ...]:
    accesses = _accesses([text])
    wide = sum(size == 16 for _, size in accesses)
    stored = sum(size for is_store, size in accesses if is_store)
    return wide, stored, -bool(_RARE.match(text)), 1


def _long(text: str) -> tuple[int, ...]:
    return (1,)


def _busy_and_long(text: str) -> tuple[int, ...]:
    wide, stored, _, one = _busy(text)
    return wide, stored, one


def loops(code: Listing, decided: Decided | None = None) -> list[Loop]:
    """The loops that touch global memory: innermost ones, in order, then what others do besides the loops in them."""
    graph = _Code(code, decided or {})
    found = []
    for span in graph.inner + [span for span in graph.spans if span not in graph.inner]:
        way = graph.way(graph.place[span[0]], graph.place[span[1]], _busy, graph.held(span))
        if way is None:
            continue
        accesses = _accesses(code[i][1] for i in way[1])
        moved = {}
        for kind in (False, True):
            sizes = [size for is_store, size in accesses if is_store is kind]
            moved[kind] = sum(size for size in sizes if size == 16) or sum(sizes)
        if accesses:
            wide = sum(size == 16 for _, size in accesses)
            found.append(Loop(len(way[1]), wide, moved[False], moved[True]))
    return found


def outside(code: Listing, decided: Decided | None = None, busiest: bool = False) -> int:
    """Instructions outside of loops on the longest way from the first to an exit, or on the `busiest`, as in loops."""
    graph = _Code(code, decided or {})
    way = graph.way(0, len(code), _busy if busiest else _long, graph.spans)
    return 0 if way is None else way[0][-1]


def once(code: Listing, decided: Decided | None = None) -> int:
    """Instructions on the busiest way from the first to an exit, of these the longest; it goes round loops once."""
    way = _Code(code, decided or {}).way(0, len(code), _busy_and_long, ())
    return 0 if way is None else way[0][-1]


def around(code: Listing) -> int:
    """Instructions in loops that hold other loops, without those."""
    graph = _Code(code, {})

    def is_in(address: int, places: list[tuple[int, int]]) -> bool:
        return any(first <= address <= last for first, last in places)

    return sum(is_in(address, graph.spans) and not is_in(address, graph.inner) for address, _ in code)


def stack_accesses_in_loops(code: Listing) -> list[str]:
    """Instructions of loops, and of what they call, that store to a thread's stack or load from it."""
    graph = _Code(code, {})
    following = [[j for j in ways if j < len(code)] for ways in graph.next]  # forward
    calls: list[tuple[int, int]] = []
    for i, (address, text) in enumerate(code):
        for pattern in (_BRANCH, _CALL):
            match = pattern.match(text)
            target = None if match is None else graph.place.get(int(match[match.lastindex], 16))
            if target is None:
                continue
            if pattern is _CALL:
                calls.append((i, target))
            elif code[target][0] <= address:
                following[i].append(target)

    def reached(starts: Iterable[int]) -> set[int]:
        found, ahead = set(), list(starts)
        while ahead:
            if (i := ahead.pop()) not in found:
                found.add(i)
                ahead += following[i]
        return found

    returns = {i for i, (_, text) in enumerate(code) if "RET." in text}
    for i, entry in list(calls):
        if not returns & reached([entry]):  # no call, but a jump
            following[i].append(entry)
            calls.remove((i, entry))

    def goes_round(i: int, callers: frozenset[int] = frozenset()) -> bool:
        if i in reached(following[i]):
            return True
        sites = {site for site, entry in calls if i in reached([entry])} - callers
        return any(goes_round(site, callers | sites) for site in sites)

    return [text for i, (_, text) in enumerate(code) if _STACK.match(text) and goes_round(i)]


def per_element(
    code: Listing,
    threads: int,
    numel: int,
    bytes_per_element: float,
    passes: int = 1,
    turns: int = 0,
    decided: Decided | None = None,
) -> float:
    """Instructions of all threads for one of `numel` elements.

    Args:
        bytes_per_element: what the kernel moves for an element, and so a round of its loop.
        passes: 2 where a loop that only loads goes over all elements before the one that stores does.
        turns: how often a thread goes round the loops that hold other loops.
        decided: which way branches go, where that is known.
    """
    found = loops(code, decided)
    in_turns = turns * around(code) if turns else 0
    once_each = (outside(code, decided) + in_turns) * threads / numel
    if not found:
        return once_each

    def busiest(candidates: list[Loop]) -> Loop:
        # The first of equal ones: later ones are for what is rare.
        return max(candidates, key=lambda loop: (loop.wide, loop.loaded + loop.stored))

    main = busiest([loop for loop in found if loop.stored] or found)
    total = main.instructions / ((main.loaded + main.stored) / bytes_per_element)
    if passes == 2:
        first = busiest([loop for loop in found if not loop.stored])
        # It loads what the other loop loads and stores.
        total += first.instructions / (first.loaded / (bytes_per_element / 2))
    return once_each + total
