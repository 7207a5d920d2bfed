"""Scheduled HLO as the TPU compiler prints it: computations, instructions, loops, cycle estimates.

The compiler writes its own estimate of the cycles of every fusion into the program. A custom kernel
has none; attention kernels are counted by their products.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"\b(to_apply|calls|body|condition)=%?([\w.\-]+)")
_GROUPS_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_GROUPS_TILED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_GROUPS_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_BITS = {"pred": 8, "token": 0}


@dataclasses.dataclass(frozen=True)
class Array:
    """Type and shape of one array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes, without padding."""
        bits = _BITS.get(self.dtype)
        bits = int(re.search(r"\d+", self.dtype)[0]) if bits is None else bits
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the program.
      opcode: such as ``"fusion"`` or ``"all-gather"``.
      results: arrays of the result, of a tuple all of them.
      operands: names.
      called: computations by the attribute that names them (``calls``, ``body``, ``condition``).
      group: devices that a collective combines, 0 where the line names none.
      cycles: the compiler's estimate, 0 without one.
      op_name: path of the JAX operation it was made from.
      text: the whole line.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    called: dict[str, str]
    group: int
    cycles: int
    op_name: str
    text: str

    @property
    def result_bytes(self) -> int:
        """Bytes of all results."""
        return sum(array.size for array in self.results)


@dataclasses.dataclass(frozen=True)
class Program:
    """A scheduled program: instructions of each computation in the order they run.

    Attributes:
      computations: by name.
      entry: name of the first one.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Program:
        """Reads ``jax.stages.Compiled.as_text()``."""
        computations: dict[str, list[Instruction]] = {}
        entry, lines = "", []
        for line in text.splitlines():
            started = _COMPUTATION.match(line)
            if started:
                name, lines = started[2], []
                computations[name] = lines
                entry = name if started[1] else entry
            elif _INSTRUCTION.match(line):
                lines.append(line)
            elif lines and not line.startswith("}, execution_thread") and line != "}":
                lines[-1] += line  # an attribute of several lines
        parsed = {name: [_parse(line) for line in body] for name, body in computations.items()}
        return cls(parsed, entry)

    def trip_count(self, loop: Instruction) -> int:
        """How often the body of a ``while`` runs: the constant its counter is compared with.

        A loop that counts differently is taken to run once.
        """
        condition = self.computations.get(loop.called.get("condition", ""), [])
        counts = [
            int(found[1])
            for line in condition
            if (found := re.search(r"s32\[\]\S* constant\((\d+)\)", line.text))
        ]
        return max(counts, default=1)

    def contains(self, computation: str, opcodes: frozenset[str]) -> Instruction | None:
        """The first instruction of one of these kinds in a computation or what it calls."""
        for line in self.computations.get(computation, ()):
            if line.opcode in opcodes:
                return line
            for name in line.called.values():
                found = self.contains(name, opcodes)
                if found is not None:
                    return found
        return None

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Every instruction of the program."""
        return {line.name: line for body in self.computations.values() for line in body}


def _parse(line: str) -> Instruction:
    name = _INSTRUCTION.match(line)
    rest = line[name.end() :]
    # The result of a tuple begins with a parenthesis too: the opcode follows the type.
    type_text, rest = _split_type(rest)
    opcode = rest[: rest.index("(")].strip()
    operands = _balanced(rest[rest.index("(") :])
    attributes = rest[rest.index("(") + len(operands) :]
    cycles, op_name = _CYCLES.search(attributes), _OP_NAME.search(attributes)
    return Instruction(
        name=name[1],
        opcode=opcode,
        results=_arrays(type_text),
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        called={kind: target for kind, target in _CALLED.findall(attributes)},
        group=_group_size(attributes),
        cycles=int(cycles[1]) if cycles else 0,
        op_name=op_name[1] if op_name else "",
        text=line,
    )


def _split_type(text: str) -> tuple[str, str]:
    if text.startswith("("):
        kind = _balanced(text)
        return kind, text[len(kind) :].lstrip()
    kind, rest = text.split(" ", 1)
    return kind, rest.lstrip()


def _balanced(text: str) -> str:
    """The text up to the parenthesis that closes its first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1]
    return text


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n))
        for dtype, shape in _ARRAY.findall(text)
    )


def _group_size(attributes: str) -> int:
    if found := _GROUPS_LISTED.search(attributes):
        return len(found[1].split(","))
    if found := _GROUPS_TILED.search(attributes):
        return int(found[1])
    if found := _GROUPS_MESH.search(attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return 0


# ----------------------------------------------------------------------------
# Custom kernels of attention, by name: products of queries and keys that one call makes. Causal
# attention does half of each.

_ATTENTION_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


def attention_flops(line: Instruction) -> float:
    """Floating-point operations of a call of the splash kernel; 0 for any other instruction."""
    if line.opcode != "custom-call":
        return 0.0
    for name, products in _ATTENTION_PRODUCTS.items():
        if line.name.startswith(name):
            layout = line.text.split("operand_layout_constraints=", 1)[-1]
            # [B, N, S, C] of queries and [B, K, T, C] of keys; a batch of one has no first axis
            shapes = [array.shape for array in _arrays(layout)]
            axes = 4 if any(len(shape) == 4 for shape in shapes) else 3
            (*parts, s, c), (*_, t, _) = [shape for shape in shapes if len(shape) == axes][:2]
            return products * 2.0 * math.prod(parts) * s * t * c / 2
    return 0.0
