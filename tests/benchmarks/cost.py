"""What one kernel of a compiled program moves and computes at least, from the text of the program (optimised HLO).

Each array that a kernel reads or writes counts once, as if caches were perfect within a kernel and empty between two.
Of an array that is only looked into (a slice, a gather) counts what is taken, and of one that is updated in place the
update. Operations are those of matrix products and convolutions, two for each multiplication; others are not counted.
"""

import math
import re
from typing import NamedTuple

# Published for the H100 SXM with 80 GB, dense: bytes of memory and float32 operations per second.
BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 3.35e12, 67e12

ARRAY = re.compile(r"(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
OPERAND = re.compile(r"%([\w.-]+)")
DIMENSIONS = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
CONVOLUTION = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
WINDOWS = ("dynamic-slice", "slice", "gather")
VIEWS = ("bitcast", "reshape")


class Instruction(NamedTuple):
    """One instruction of a computation."""

    name: str
    type: str  # such as f32[4]{0}, or a tuple of them
    opcode: str
    text: str  # its operands and attributes

    @property
    def operands(self) -> list[str]:
        return OPERAND.findall(self.text.split("),")[0])


Computation = list[Instruction]


class Cost(NamedTuple):
    """Of kernels that run one after the other."""

    kernels: int = 0
    bytes: int = 0
    operations: int = 0
    seconds: float = 0.0  # at the published rates, for each kernel the longer of moving and computing

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        return Cost(
            self.kernels + times * other.kernels,
            self.bytes + times * other.bytes,
            self.operations + times * other.operations,
            self.seconds + times * other.seconds,
        )


def cost_of(instruction: Instruction, within: Computation, computations: dict[str, Computation]) -> Cost:
    """The cost of a kernel.

    Args:
        instruction: is run as one kernel.
        within: the computation that holds it.
        computations: of the program, by name.
    """
    types = {other.name: other.type for other in within}
    inside = re.search(r"calls=%?([\w.-]+)", instruction.text)
    if inside and instruction.opcode.startswith("fusion"):
        moved = bytes_of_fusion(computations[inside[1]])
    else:
        moved = _moved_alone(instruction, types)
    operations = operations_of(instruction, types, computations)
    seconds = max(moved / BYTES_PER_SECOND, operations / OPERATIONS_PER_SECOND)
    return Cost(1, moved, operations, seconds)


def _moved_alone(instruction: Instruction, types: dict[str, str]) -> int:
    """What an instruction that is not fused reads and writes."""
    read = [bytes_of(types.get(name, "")) for name in instruction.operands]
    if instruction.opcode in WINDOWS:
        return 2 * bytes_of(instruction.type) + sum(read[1:])
    if instruction.opcode == "dynamic-update-slice":
        return 2 * read[1] + sum(read[2:])
    return bytes_of(instruction.type) + sum(read)


def bytes_of(type_: str) -> int:
    """The bytes of an array, or of all arrays of a tuple."""
    return sum(_bytes_of_element(dtype) * size(shape) for dtype, shape in ARRAY.findall(type_))


def _bytes_of_element(dtype: str) -> int:
    return 1 if dtype == "pred" else max(int(re.sub(r"\D+", "", dtype)) // 8, 1)


def size(shape: str) -> int:
    return math.prod(map(int, filter(None, shape.split(","))))


def bytes_of_fusion(fused: Computation) -> int:
    """What a fused computation reads of its parameters, and writes."""
    by_name = {instruction.name: instruction for instruction in fused}
    root = fused[-1]  # XLA prints it last
    written = root.operands if root.opcode == "tuple" else [root.name]
    parameters = [instruction for instruction in fused if instruction.opcode == "parameter"]
    return sum(_read(parameter, fused) for parameter in parameters) + sum(
        _written(by_name[x], by_name) for x in written
    )


def _read(array: Instruction, fused: Computation) -> int:
    total = 0
    for user in fused:
        if array.name not in user.operands:
            continue
        first = user.operands[0] == array.name
        if user.opcode in VIEWS:
            total += _read(user, fused)
        elif user.opcode in WINDOWS and first:
            total += bytes_of(user.type)
        elif not (user.opcode == "dynamic-update-slice" and first):  # whose other elements stay where they are
            total += bytes_of(array.type)
    return min(total, bytes_of(array.type))


def _written(array: Instruction, by_name: dict[str, Instruction]) -> int:
    while array.opcode in VIEWS:
        array = by_name[array.operands[0]]
    updated = array.opcode == "dynamic-update-slice"
    return bytes_of(by_name[array.operands[1]].type if updated else array.type)


def operations_of(instruction: Instruction, types: dict[str, str], computations: dict[str, Computation]) -> int:
    """Those of the products and convolutions in a kernel."""
    if instruction.opcode == "dot":
        left = [int(x) for x in ARRAY.findall(types[instruction.operands[0]])[0][1].split(",")]
        found = DIMENSIONS.search(instruction.text)
        contracted = math.prod(left[int(i)] for i in found[1].split(",")) if found else 1
        return 2 * contracted * size(ARRAY.findall(instruction.type)[0][1])
    if labels := CONVOLUTION.search(instruction.text):
        return _operations_of_convolution(instruction, labels, types)
    inside = re.search(r"calls=%?([\w.-]+)", instruction.text)
    if not inside:
        return 0
    fused = computations[inside[1]]
    types = {other.name: other.type for other in fused}
    return sum(operations_of(other, types, computations) for other in fused)


def _operations_of_convolution(instruction: Instruction, labels: re.Match, types: dict[str, str]) -> int:
    """For each element of what the convolution returns forward: one product with each weight of a feature."""
    shapes = [ARRAY.findall(types[name])[0][1] for name in instruction.operands[:2]]
    result = ARRAY.findall(instruction.type)[0][1]
    kernel, features = shapes[1], result
    if "convBackwardInput" in instruction.text:
        features = shapes[0]
    elif "convBackwardFilter" in instruction.text:
        kernel, features = result, shapes[1]
    num_features = int(kernel.split(",")[labels[2].index("o")])
    return 2 * size(features) * size(kernel) // num_features
