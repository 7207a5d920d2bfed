"""Collectives of a scheduled program: bytes, what hides them behind arithmetic, and the step time.

The schedule is walked with two clocks: arithmetic advances one, transfers between chips the other.
An asynchronous collective starts when its ``-start`` line is reached and the links are free; at its
``-done`` line the arithmetic waits for what is left of it. That wait, and every synchronous
collective, is exposed time.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from univla_jax.planning.hlo import Instruction, Program, attention_flops
from univla_jax.training.hardware import Chip

KINDS = frozenset(
    {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
)
SMALL = 2**20  # bytes; below, a collective costs latency, not bandwidth
_LATENCY = 1e-6  # seconds per link that a message crosses


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      name: of the instruction.
      kind: one of ``KINDS``.
      op_name: path of the JAX operation it serves; empty where the compiler made it up.
      payload: bytes of the whole array on one chip, each time it runs.
      group: chips that take part.
      runs: how often it runs in a step.
      in_loop: whether it stands in a loop.
      asynchronous: whether arithmetic may go on while it runs.
      seconds: on the links, each time.
      exposed: seconds that arithmetic waits for it, each time.
    """

    name: str
    kind: str
    op_name: str
    payload: int
    group: int
    runs: int
    in_loop: bool
    asynchronous: bool
    seconds: float
    exposed: float

    @property
    def total_bytes(self) -> int:
        """Payload of all runs."""
        return self.payload * self.runs

    @property
    def hidden_bytes(self) -> float:
        """Payload of all runs that travels while arithmetic goes on."""
        if not self.asynchronous:
            return 0.0
        return self.total_bytes * (1 - min(1.0, self.exposed / max(self.seconds, _LATENCY)))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What the chips exchange in one step, and how long the step takes.

    Attributes:
      collectives: of the program, in the order in which they end.
      compute_seconds: of arithmetic and memory alone, by the compiler's own estimates.
      exposed_seconds: in which arithmetic waits for a collective.
    """

    collectives: tuple[Collective, ...]
    compute_seconds: float
    exposed_seconds: float

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return self.compute_seconds + self.exposed_seconds

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Payload per chip and step."""
        sums: dict[str, int] = defaultdict(int)
        for collective in self.collectives:
            sums[collective.kind] += collective.total_bytes
        return dict(sorted(sums.items()))

    @property
    def asynchronous_share(self) -> float:
        """Fraction of all bytes that asynchronous collectives move."""
        return self._share(c.total_bytes for c in self.collectives if c.asynchronous)

    @property
    def hidden_share(self) -> float:
        """Fraction of all bytes that travel while arithmetic goes on."""
        return self._share(c.hidden_bytes for c in self.collectives)

    @property
    def synchronous_in_loops(self) -> list[Collective]:
        """Large collectives that stop every turn of a loop."""
        return [
            c for c in self.collectives if c.in_loop and not c.asynchronous and c.payload >= SMALL
        ]

    @property
    def surprises(self) -> list[Collective]:
        """Large collectives that no operation of the model asked for: arrays laid out anew."""
        return [c for c in self.collectives if c.payload >= SMALL and not _is_asked_for(c)]

    def to_dict(self) -> dict[str, object]:
        """JSON values; collectives only as sums."""
        return {
            "bytes_by_kind": self.bytes_by_kind,
            "asynchronous_share": self.asynchronous_share,
            "hidden_share": self.hidden_share,
            "compute_seconds": self.compute_seconds,
            "exposed_seconds": self.exposed_seconds,
            "synchronous_in_loops": [c.name for c in self.synchronous_in_loops],
            "surprises": [f"{c.kind} {c.name}" for c in self.surprises],
        }

    def describe(self) -> dict[str, str]:
        """Some titled lines of text."""
        kinds = ", ".join(
            f"{size / 1e9:.1f} GB {kind}" for kind, size in self.bytes_by_kind.items()
        )
        lines = {
            "traffic": f"{kinds or 'none'} per chip; {self.asynchronous_share:.0%} asynchronous, "
            f"{self.hidden_share:.0%} behind arithmetic, {self.exposed_seconds:.3f} s exposed"
        }
        if self.synchronous_in_loops:
            names = ", ".join(sorted({c.kind for c in self.synchronous_in_loops}))
            lines["in every layer"] = f"{len(self.synchronous_in_loops)} synchronous: {names}"
        if self.surprises:
            largest = sorted(self.surprises, key=lambda c: -c.total_bytes)[:3]
            named = "; ".join(
                f"{c.kind} of {c.total_bytes / 1e6:,.0f} MB ({c.op_name or c.name})"
                for c in largest
            )
            lines["resharding"] = f"{len(self.surprises)} that the model did not ask for: {named}"
        return lines

    def _share(self, parts: Iterator[float]) -> float:
        total = sum(c.total_bytes for c in self.collectives)
        return sum(parts) / total if total else 1.0


def _is_asked_for(collective: Collective) -> bool:
    written = ("all_gather", "reduce_scatter", "psum", "all_to_all", "pmax", "ppermute")
    return any(name in collective.op_name for name in written)


def analyze(
    program: Program, chip: Chip, shape: Sequence[int], computation: str | None = None
) -> Traffic:
    """Walks a program that the TPU compiler scheduled.

    Args:
      program: of one chip.
      chip: its data sheet.
      shape: chips of the slice along each axis of its torus.
      computation: name of the one to walk, such as the body of a loop; by default all.
    """
    return _Walk(program, chip, tuple(shape)).run(computation or program.entry)


class _Walk:
    """The two clocks, and the collectives that are under way."""

    def __init__(self, program: Program, chip: Chip, shape: tuple[int, ...]) -> None:
        self.program, self.chip, self.shape = program, chip, shape
        self.collectives: list[Collective] = []

    def run(self, computation: str) -> Traffic:
        compute, exposed = self._computation(computation, 1, in_loop=False)
        return Traffic(tuple(self.collectives), compute, exposed)

    def _computation(self, name: str, runs: int, *, in_loop: bool) -> tuple[float, float]:
        """Seconds of arithmetic and of waiting, each time the computation runs."""
        compute = waited = links_free = 0.0
        pending: dict[str, tuple[float, float, Collective]] = {}
        for line in self.program.computations[name]:
            now = compute + waited
            if line.opcode == "while":
                turns = self.program.trip_count(line)
                inner = self._computation(line.called["body"], runs * turns, in_loop=True)
                compute, waited = compute + inner[0] * turns, waited + inner[1] * turns
            elif line.opcode == "conditional":
                compute += max(
                    (self._computation(n, runs, in_loop=in_loop)[0] for n in _branches(line)),
                    default=0.0,
                )
            elif line.opcode.endswith("-done"):
                started = pending.pop(line.operands[0], None) if line.operands else None
                if started is not None:
                    _, ends, collective = started
                    wait = max(0.0, ends - now)
                    waited += wait
                    self._add(collective, runs, in_loop, exposed=wait)
            else:
                found = self._collective(line)
                if found is None:
                    compute += self._seconds(line)
                elif found.asynchronous:
                    begins = max(now, links_free)
                    links_free = begins + found.seconds
                    pending[line.name] = begins, links_free, found
                else:
                    begins = max(now, links_free)
                    links_free = begins + found.seconds
                    waited += links_free - now
                    self._add(found, runs, in_loop, exposed=links_free - now)
        for _, ends, collective in pending.values():
            wait = max(0.0, ends - compute - waited)
            waited += wait
            self._add(collective, runs, in_loop, exposed=wait)
        return compute, waited

    def _add(self, collective: Collective, runs: int, in_loop: bool, exposed: float) -> None:
        self.collectives.append(
            dataclasses.replace(collective, runs=runs, in_loop=in_loop, exposed=exposed)
        )

    def _seconds(self, line: Instruction) -> float:
        """Of one instruction's arithmetic."""
        flops = attention_flops(line)
        if flops:
            return COMPUTE_SCALE * flops / (self.chip.teraflops * 1e12 * _ATTENTION_EFFICIENCY)
        return COMPUTE_SCALE * line.cycles / (self.chip.gigahertz * 1e9)

    def _collective(self, line: Instruction) -> Collective | None:
        """The collective that an instruction is or starts, without its place in the program."""
        opcode = line.opcode
        start = opcode.endswith("-start")
        inner = line
        if opcode.removesuffix("-start") not in KINDS:
            if not start and opcode != "fusion":
                return None
            started = KINDS | {f"{kind}-start" for kind in KINDS}
            targets = [n for kind, n in line.called.items() if kind in ("to_apply", "calls")]
            found = [self.program.contains(n, started) for n in targets]
            inner = next((f for f in found if f is not None), None)
            if inner is None or opcode.startswith("copy"):
                return None
        kind = inner.opcode.removesuffix("-start")
        operands = [self.program.by_name.get(name) for name in inner.operands]
        sizes = [sum(o.result_bytes for o in operands if o is not None), _result_bytes(inner)]
        payload, group = max(sizes), inner.group or math.prod(self.shape)
        return Collective(
            name=line.name,
            kind=kind,
            op_name=inner.op_name or line.op_name,
            payload=payload,
            group=group,
            runs=1,
            in_loop=False,
            asynchronous=start,
            seconds=self._link_seconds(kind, payload, group),
            exposed=0.0,
        )

    def _link_seconds(self, kind: str, payload: int, group: int) -> float:
        """Time of a bandwidth-optimal algorithm over the axes of the torus that a group spans."""
        if group <= 1:
            return 0.0
        # A mesh axis is laid along as few axes of the torus as hold it. A ring closed by a
        # wrap-around link is used both ways; an open line passes everything through its ends.
        spanned, chips = [], 1
        for size in sorted(self.shape, reverse=True):
            if chips < group:
                spanned.append(size)
                chips *= size
        links = sum(2 if self.chip.wraps(size) else 1 for size in spanned)
        rate = links * self.chip.link_gigabytes_per_second * 1e9
        rounds = {"all-reduce": 2.0, "collective-permute": 1.0}.get(kind, 1.0)
        if kind == "all-to-all":  # each byte crosses a quarter of a ring, or a third of a line
            rounds = max(1.0, max(spanned) / 8)
        moved = payload * (1 if kind == "collective-permute" else (group - 1) / group)
        return rounds * moved / rate + sum(spanned) * _LATENCY


# Measured over estimated time of arithmetic; 1 takes the compiler's estimates as they are, which no
# measured step has corrected yet.
COMPUTE_SCALE = 1.0
# Of the peak, the splash kernel is taken to reach: it multiplies by 128 columns at a time,
# masks, and takes exponents in between. An assumption, not a measurement.
_ATTENTION_EFFICIENCY = 0.4


def _result_bytes(line: Instruction) -> int:
    # A start line returns its operands beside its results; the results come last.
    if line.opcode.endswith("-start"):
        return max((array.size for array in line.results), default=0)
    return line.result_bytes


def _branches(line: Instruction) -> list[str]:
    found = line.text.split("branch_computations={", 1)
    if len(found) == 2:
        return [name.strip().lstrip("%") for name in found[1].split("}", 1)[0].split(",")]
    return []
