"""Which branches of a kernel its parameters decide: those that every thread of a launch takes, or none.

Constants are followed through the machine's instructions, from parameters and the sizes of grid and blocks through the
integer arithmetic and comparisons that they meet on the way to a branch; what an unknown instruction writes is unknown.
"""

from __future__ import annotations

import operator
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping

Listing = list[tuple[int, str]]
#: Address in bank 0 -> the byte there, for what is known: the sizes of blocks and grid, and the parameters.
Constants = Mapping[int, int]
#: Register or predicate -> its value, for those that are known.
State = dict[str, int]

_PARTS = re.compile(r"^(?:@(!?)(U?P\w+) )?([\w.]+)(?: (.*))?$")
_CONSTANT = re.compile(r"^c\[0x0\]\[0x([0-9a-f]+)\]$")
_REGISTER = re.compile(r"^(U?R)(\d+)$")
_PREDICATE = re.compile(r"^U?P\d$")
_ADDRESS = re.compile(r"^0x[0-9a-f]+$")
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
_WITHOUT_RESULT = ("STG", "STS", "STL", "ST", "RED", "BRA", "CALL", "RET")
_ENDS = ("BRA", "EXIT", "RET")
_BITS = 0xFFFFFFFF


class _Instruction:
    """The parts of an instruction's text."""

    def __init__(self, text: str) -> None:
        match = _PARTS.match(text)
        negated, guard, operation, rest = match.groups() if match else ("", None, text.split(" ")[0], None)
        self.is_negated = bool(negated)
        self.guard = guard or ""
        self.op, *self.modifiers = operation.split(".")
        self.operands = [operand.removesuffix(".reuse") for operand in (rest or "").split(", ")]
        self.written = self._written()

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        if self.op == "BRA" and _ADDRESS.match(self.operands[-1]):
            return int(self.operands[-1], 16)
        return None

    def _written(self) -> list[str]:
        """Registers that it may write, and every predicate that it names."""
        names = [operand for operand in self.operands if _PREDICATE.match(operand)]
        if self.op in _WITHOUT_RESULT:
            return names
        if self.op == "R2P":
            return [*names, *(f"P{i}" for i in range(7))]
        # A predicate may come before the result.
        match = next((found for operand in self.operands[:2] if (found := _REGISTER.match(operand))), None)
        if match is None:
            return names
        is_double = self.op.startswith("D") or "F64" in self.modifiers or "64H" in self.modifiers
        wide = is_double or {"64", "WIDE"} & set(self.modifiers) or (self.op == "CS2R" and "32" not in self.modifiers)
        count = 4 if "128" in self.modifiers else 2 if wide else 1
        return names + [f"{match[1]}{int(match[2]) + i}" for i in range(count)]


def decided(listing: Listing, constants: Constants) -> dict[int, bool]:
    """Address of a conditional branch -> whether it is taken, for those that `constants` decides."""
    addresses = [address for address, _ in listing]
    code = [_Instruction(text) for _, text in listing]
    if any(instruction.op in ("BRX", "JMX", "JMP") for instruction in code):
        return {}  # which may go anywhere
    starts = {bisect_left(addresses, target) for one in code if (target := one.target) is not None}
    states: dict[int, State] = {0: {}}
    waiting = [0]

    def go(place: int, state: State) -> None:
        if place >= len(code):
            return
        before = states.get(place)
        joined = dict(state) if before is None else {k: v for k, v in before.items() if state.get(k) == v}
        if before is None or len(joined) < len(before):
            states[place] = joined
            waiting.append(place)

    def walk(place: int, found: dict[int, bool] | None = None) -> None:
        """To the end of the block that begins there, and from there on to the next ones, or to `found`."""
        state = dict(states[place])
        while place < len(code):
            one = code[place]
            if one.op in _ENDS:
                runs = _runs(one, state)
                if found is not None and one.target is not None and one.guard and runs is not None:
                    found[addresses[place]] = runs
                if found is None and runs is not False and one.target is not None:
                    go(bisect_left(addresses, one.target), state)
                if found is None and runs is not True:
                    go(place + 1, state)
                return
            _step(one, state, constants)
            if one.op == "CALL":
                _forget_subroutine(one, state, code, addresses)
            place += 1
            if place in starts:
                if found is None:
                    go(place, state)
                return

    while waiting:
        walk(waiting.pop())
    found: dict[int, bool] = {}
    for place in states:
        walk(place, found)
    return found


def _runs(one: _Instruction, state: State) -> bool | None:
    """Whether an instruction runs, by its guard; None where that is not known."""
    if one.op == "BRA" and len(one.operands) > 1:  # which has conditions of its own
        return None
    if not one.guard:
        return True
    value = _value(("!" if one.is_negated else "") + one.guard, state, {})
    return None if value is None else bool(value)


def _forget_subroutine(call: _Instruction, state: State, code: list[_Instruction], addresses: list[int]) -> None:
    """Subroutines come last, and may write what any of them writes."""
    if not _ADDRESS.match(call.operands[-1]):
        state.clear()
        return
    for one in code[bisect_left(addresses, int(call.operands[-1], 16)) :]:
        for name in one.written:
            state.pop(name, None)


def _step(one: _Instruction, state: State, constants: Constants) -> None:
    runs = _runs(one, state)
    if runs is False:
        return
    results = _results(one, state, constants) if runs else {}
    for name in one.written:
        state.pop(name, None)
    state.update(results)


def _results(one: _Instruction, state: State, constants: Constants) -> State:
    """What an instruction that runs writes, as far as it is known."""
    op, modifiers, operands = one.op.removeprefix("U"), one.modifiers, one.operands
    values = [_value(operand, state, constants) for operand in operands]
    result = None
    if op == "LDC":
        return _loaded(one, constants)
    if op == "CS2R" and operands[1] == "SRZ":
        return dict.fromkeys(one.written, 0)
    if op == "ISETP" and operands[1] in ("PT", "UPT") and modifiers[0] in _COMPARE:
        return _compared(modifiers, operands[0], values[2:])
    if op == "PLOP3" and operands[5:] == ["0x80", "0x0"] and None not in values[2:5]:
        return {operands[0]: int(all(values[2:5]))}
    if op == "HFMA2" and operands[1:] == ["-RZ", "RZ", "0", "0"]:
        result = 0
    elif op in ("MOV", "R2UR") and len(values) == 2:
        result = values[1]
    elif op == "IMAD" and len(values) == 4 and not {"WIDE", "HI", "X"} & set(modifiers):
        result = _product(*values[1:])
    elif op == "IADD3" and len(values) == 4 and "X" not in modifiers and None not in values[1:]:
        result = sum(values[1:])
    elif op == "SHF" and None not in values[1:]:
        result = _shifted(modifiers, *values[1:])
    return {} if result is None else {operands[0]: result & _BITS}


def _loaded(one: _Instruction, constants: Constants) -> State:
    match = _CONSTANT.match(one.operands[1])
    size = {"": 4, "U8": 1, "U16": 2, "64": 8}.get(".".join(one.modifiers))
    if match is None or size is None:
        return {}
    found = [_constant(constants, int(match[1], 16) + i, min(size, 4)) for i in range(0, size, 4)]
    names = [name for name in one.written if _REGISTER.match(name)]
    return {} if None in found else dict(zip(names, found, strict=True))


def _product(a: int | None, b: int | None, c: int | None) -> int | None:
    """a b + c, of which a factor may be unknown where the other is 0."""
    if c is None or (0 not in (a, b) and None in (a, b)):
        return None
    return (a or 0) * (b or 0) + c


def _shifted(modifiers: list[str], low: int, by: int, high: int) -> int | None:
    if modifiers == ["L", "U32"] and high == 0:
        return low << by if by < 32 else 0
    if modifiers == ["R", "U32", "HI"] and low == 0:
        return high >> by
    if modifiers == ["R", "S32", "HI"] and low == 0:
        return _signed(high) >> by
    return None


def _compared(modifiers: list[str], result: str, values: list[int | None]) -> State:
    if None in values or not {"AND", "OR"} & set(modifiers):
        return {}
    a, b, combined, *low = (value for value in values if value is not None)
    if "U32" not in modifiers:
        a, b = _signed(a), _signed(b)
    holds = _COMPARE[modifiers[0]](a, b)
    if "EX" in modifiers and a == b:  # the upper halves; the last operand is what the lower ones gave
        holds = bool(low[0])
    return {result: int(holds and combined if "AND" in modifiers else holds or combined)}


def _signed(value: int) -> int:
    return value - (value >> 31 << 32)


def _constant(constants: Constants, address: int, size: int) -> int | None:
    found = [constants.get(address + i) for i in range(size)]
    return None if None in found else int.from_bytes(bytes(found), "little")


def _value(operand: str, state: State, constants: Constants) -> int | None:
    """A register's, an integer's or a predicate's; None where it is not known."""
    is_not, name = operand.startswith("!"), operand.removeprefix("!")
    if name in ("PT", "UPT"):
        return int(not is_not)
    if _PREDICATE.match(name):
        return None if name not in state else int(bool(state[name]) is not is_not)
    if name in ("RZ", "URZ"):
        return 0
    if re.fullmatch(r"-?0x[0-9a-f]+", name):
        return int(name, 16) & _BITS
    if match := _CONSTANT.match(name):
        return _constant(constants, int(match[1], 16), 4)
    return state.get(name)
