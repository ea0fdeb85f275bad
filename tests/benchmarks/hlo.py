"""Counts kernels in the text of a compiled program (optimised HLO) and what they cost, with the loops around them.

Every instruction that computes or copies counts as one kernel: a fusion, a copy, a sort, a call of a library. What a
fusion holds is part of its kernel. Two kinds may take several launches: a call of a library, and a sort of rows of
more than 4,096 numbers (15 for 65,536, which is the shuffle of 2048 environments x 32 steps).
"""

import re
from collections.abc import Iterator
from itertools import combinations, takewhile
from typing import Any, NamedTuple

from cost import Computation, Cost, Instruction, cost_of

# `%name (parameters) -> type {` opens a computation; ENTRY marks the one that the program starts with.
COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
# `  %name = type opcode(operands), attributes`: inside a type no blank is followed by a word and a parenthesis.
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
# The computations that an instruction runs: `body=%name` or `branch_computations={%name, %name}`.
CALLED = re.compile(
    r"(body|condition|calls|to_apply|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Nothing is launched for these.
FREE = {
    "add-dependency", "after-all", "async-update", "bitcast", "constant", "get-tuple-element", "opt-barrier",
    "parameter", "partition-id", "replica-id", "tuple",
}  # fmt: skip


class Loop(NamedTuple):
    """A loop of a program; a program is a loop of one iteration."""

    trip_count: int | None  # None where the compiler does not know it; one iteration is counted then
    own: Cost  # of one iteration, without the loops in it
    loops: tuple["Loop", ...]  # the loops in it, in the order in which they run

    @property
    def iteration(self) -> Cost:
        """The cost of one iteration."""
        cost = self.own
        for loop in self.loops:
            cost = cost.plus(loop.total)
        return cost

    @property
    def total(self) -> Cost:
        """The cost of all iterations."""
        return Cost().plus(self.iteration, 1 if self.trip_count is None else self.trip_count)

    @property
    def unknown_loops(self) -> int:
        """How many loops in it, at any depth, have a trip count that the compiler does not know."""
        return sum((loop.trip_count is None) + loop.unknown_loops for loop in self.loops)


def read_program(text: str) -> Loop:
    """The loops of a compiled program, from what `jax.stages.Compiled.as_text` returns."""
    computations, entry = {}, ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            instructions = computations[header["name"]] = []
            entry = header["name"] if header["entry"] else entry
        elif instruction := INSTRUCTION.match(line):
            instructions.append(Instruction(*instruction.groups()))
    return read_loop(1, [entry], computations)


def read_loop(trip_count: int | None, names: list[str], computations: dict[str, Computation]) -> Loop:
    """A loop whose iteration runs the named computations one after the other."""
    own, loops = Cost(), []
    for instruction, within in [(each, computations[name]) for name in names for each in computations[name]]:
        called = {key: re.findall(r"[\w.-]+", value) for key, value in CALLED.findall(instruction.text)}
        if instruction.opcode == "while":
            known = TRIP_COUNT.search(instruction.text)
            # Where the trip count is known the condition is never evaluated.
            repeated = called["body"] if known else called["body"] + called["condition"]
            loops.append(read_loop(int(known[1]) if known else None, repeated, computations))
        elif instruction.opcode in ("call", "call-start", "async-start", "conditional"):
            # A call runs one computation. Of the branches of a conditional the one with the most kernels counts.
            branches = [read_loop(1, [name], computations) for names in called.values() for name in names]
            inside = max(branches, key=lambda branch: branch.total.kernels)
            own = own.plus(inside.own)
            loops.extend(inside.loops)
        elif instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
            own = own.plus(cost_of(instruction, within, computations))  # the kernel of a pair is its `-start`
    return Loop(trip_count, own, tuple(loops))


def count_cycle(program: Loop, num_updates: int, num_steps: int, num_minibatches: int) -> dict:
    """Kernels of one cycle of `train`, of one of its rollout steps, of one of its minibatches (of all epochs together
    there are `num_minibatches`), and of all the rest; the bytes of a minibatch, and the cost of the cycle.

    The loops are found by how often they run in a cycle. An unrolled loop does several steps in an iteration, so its
    iterations divide their number. Of the loops that fit, the rollout and the minibatches are the two, in this order,
    that run the most kernels.
    """
    cycles = [loop for loop in program.loops if loop.trip_count == num_updates]
    cycle = max(cycles, key=lambda loop: loop.total.kernels, default=Loop(1, Cost(), ()))
    known = list(loops_within(cycle))
    pairs = [
        (rollout, minibatches)
        for rollout, minibatches in combinations(known, 2)
        if num_steps % rollout.times == 0 and num_minibatches % minibatches.times == 0
        if minibatches.path[: len(rollout.path)] != rollout.path
    ]
    if not pairs:
        raise ValueError(
            f"found no loop of {num_updates} updates that holds a loop of {num_steps} steps "
            f"and then one of {num_minibatches} minibatches"
        )
    rollout, minibatches = max(pairs, key=lambda pair: (sum(x.cost.kernels for x in pair), sum(x.times for x in pair)))
    whole = cycle.iteration
    return {
        "rollout_step": rollout.cost.kernels / num_steps,
        "minibatch": minibatches.cost.kernels / num_minibatches,
        "rest": whole.kernels - rollout.cost.kernels - minibatches.cost.kernels,
        "cycle": whole.kernels,
        "unknown_loops": cycle.unknown_loops,
        "minibatch_bytes": minibatches.cost.bytes / num_minibatches,
        "bytes": whole.bytes,
        "operations": whole.operations,
        "seconds_at_published_rates": whole.seconds,
    }


class Place(NamedTuple):
    """A loop somewhere within a cycle."""

    path: tuple[int, ...]  # which loop of the cycle, which loop of that one, ...
    times: int  # iterations in a cycle, those of the loops around it multiplied in
    cost: Cost  # of all of them


def loops_within(loop: Loop, path: tuple[int, ...] = (), times: int = 1) -> Iterator[Place]:
    """The loops of known length within a loop, at any depth, in the order in which they run."""
    for i, inner in enumerate(loop.loops):
        if inner.trip_count:
            number = times * inner.trip_count
            yield Place((*path, i), number, Cost().plus(inner.iteration, number))
            yield from loops_within(inner, (*path, i), number)


THUNK = re.compile(r"^(\s*)(?:\d+: (k\w+)|(body):)")
NO_LAUNCH = {"kAsyncStart", "kAsyncDone", "kDynamicSliceFusion", "body"}


class Launches(NamedTuple):
    """What the host launches for a program once CUDA graphs are made of parts of it."""

    graphs: int
    plain: int  # kernels and calls outside graphs

    def __add__(self, other: Any) -> "Launches":
        return Launches(self.graphs + other.graphs, self.plain + other.plain)

    def __mul__(self, number: int) -> "Launches":
        return Launches(self.graphs * number, self.plain * number)


def count_launches(thunks: str, program: Loop) -> list[Launches]:
    """The launches of one iteration of each outer loop of a program, those of inner loops multiplied in.

    Args:
        thunks: the text that XLA dumps after its passes over thunks.
        program: the same program, for the trip counts of its loops, which the text lacks.
    """
    found = [THUNK.match(line) for line in thunks.splitlines()]
    lines = [(len(match[1]), match[2] or match[3]) for match in found if match]
    return _launches(lines, program)[1]


def _launches(lines: list[tuple[int, str]], loop: Loop) -> tuple[Launches, list[Launches]]:
    """The launches of a block of lines, and of one iteration of each loop in it; all within a graph are one."""
    own, loops, unseen, i = Launches(0, 0), [], list(loop.loops), 0
    while i < len(lines):
        indent, kind = lines[i]
        inside = list(takewhile(lambda line: line[0] > indent, lines[i + 1 :]))  # noqa: B023
        i += 1 + len(inside)
        if kind == "kCommandBuffer":
            own += Launches(1, 0)
            unseen = unseen[sum(inner == "kWhile" and depth == inside[0][0] for depth, inner in inside) :]
        elif kind == "kWhile":
            body = next((j for j, line in enumerate(inside) if line[1] == "body"), 0)
            per_iteration = _launches(inside[body + 1 :], unseen[0])[0]
            loops.append(per_iteration)
            own += per_iteration * (unseen.pop(0).trip_count or 1)
        elif kind not in NO_LAUNCH:
            own += Launches(0, 1)
    return own, loops
