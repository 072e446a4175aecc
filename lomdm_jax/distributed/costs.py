"""What a program costs, read from the program itself: FLOPs of its matrix products from the jaxpr,
and from the compiled text the bytes it reads and writes and those that devices send each other.

The compiler's own analysis counts the body of a loop once, however often it runs; a step that is
cut into micro-batches would seem that much cheaper. Here every loop counts as often as it runs.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from lomdm_jax.models.readout import RECOMPUTED

# --- FLOPs, from the jaxpr ---


def matmul_flops(traced: Any, *, recomputed: bool = True) -> int:
    """Floating-point operations of the matrix products of a program, over all devices.

    traced: its jax.stages.Traced, or its jaxpr. A product of [M, K] and [K, N] counts 2 M K N; a
    loop as often as it runs (a `while` whose length nobody knows: once), of a `cond` the dearest
    branch.

    Of attention's kernels what they compute. Splash attention: 2 products of all pairs of tokens
    forward, 7 for the gradient, as both of its kernels make the scores again and what follows from
    them; cuDNN's: 2 and 5. With a causal mask less: splash attention skips whole blocks of hidden
    pairs, of cuDNN's half is counted. Segments save nothing.

    Args:
      recomputed: whether what is computed again for the gradient counts again: by jax.checkpoint,
        by attention's kernels (which need 4 products), and in the scope RECOMPUTED.

    Raises:
      NotImplementedError: the program has products that are neither dot_general nor those.
    """
    return _flops(traced.jaxpr, recomputed)


def _flops(jaxpr: Any, recomputed: bool) -> int:
    return sum(_flops_of(equation, recomputed) for equation in jaxpr.eqns)


def _flops_of(equation: Any, recomputed: bool) -> int:
    name, params = equation.primitive.name, equation.params
    if not recomputed and RECOMPUTED in str(equation.source_info.name_stack):
        return 0
    if name == "dot_general":
        return _dot_flops(equation)
    if name in _CUDNN:
        return _cudnn_flops(equation, recomputed)
    if name == "pallas_call" and (params["name"] or "").startswith("splash_mha"):
        return _splash_flops(equation, recomputed)
    if name.startswith(("conv_general", "ragged_dot", "pallas_call", "dot_product_attention")):
        raise NotImplementedError(f"costs.matmul_flops knows no {name}: count its products there.")
    inside = [_flops(jaxpr, recomputed) for jaxpr in _jaxprs(params.values())]
    if name == "cond":
        return max(inside)
    return sum(inside) * _repeats(name, params)


def _dot_flops(equation: Any) -> int:
    """2 x the elements of the result x the elements that each sums over."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)


# The products of splash attention's kernels that are made for the first time.
_SPLASH_NEW = {"dkv": Fraction(3, 4), "dq": Fraction(1, 3)}


def _splash_flops(equation: Any, recomputed: bool) -> int:
    """Each step of the grid, [..., blocks of keys or queries], makes the products of two blocks.
    A causal mask, made of the numbers of the rows, skips what is above the blocks' diagonal."""
    mapping = equation.params["grid_mapping"]
    flops = math.prod(mapping.grid) * _flops(equation.params["jaxpr"], recomputed)
    if not recomputed:
        kernel = equation.params["name"].removeprefix("splash_mha_").partition("_")[0]
        flops = int(flops * _SPLASH_NEW.get(kernel, 1))
    given = [variable.aval.dtype for variable in equation.invars[mapping.num_index_operands :]]
    blocks = mapping.grid[-1]
    # Segments are two arrays of int32, for queries and for keys.
    return flops * (blocks + 1) // (2 * blocks) if given.count("int32") % 2 else flops


# Products of all pairs of tokens in the primitives of cuDNN's flash attention, and those of them
# that are made for the first time.
_CUDNN = {"dot_product_attention_fwd_wrapper": (2, 2), "dot_product_attention_bwd_wrapper": (5, 4)}


def _cudnn_flops(equation: Any, recomputed: bool) -> int:
    """The queries are [..., L, H, D], the keys as many."""
    shape, (all_products, new) = equation.invars[0].aval.shape, _CUDNN[equation.primitive.name]
    flops = (all_products if recomputed else new) * 2 * math.prod(shape) * shape[-3]
    return flops // 2 if equation.params["mask_type"].name == "CAUSAL" else flops


def _repeats(name: str, params: dict[str, Any]) -> int:
    """How often what an equation holds is run, over all devices."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # its shapes are those of one device
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _jaxprs(value)
        elif hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


# --- The compiled program ---


class Instruction(NamedTuple):
    """One line of a compiled program.

    shape: of the result, as text; inside: what stands between the parentheses; attributes: what
    follows them.
    """

    name: str
    root: bool
    shape: str
    opcode: str
    inside: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names of the instructions whose results it takes."""
        return re.findall(r"%([\w.\-]+)", self.inside)


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """computations: by name; entry: the one that is run; partitions: devices it is made for."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


class Visit(NamedTuple):
    """An instruction that is run, how often, and the computation that it and its operands are in.
    fused: inside a fusion, so that nothing of it reaches memory."""

    instruction: Instruction
    times: int
    scope: Computation
    fused: bool


def parse(text: str) -> Program:
    """The computations of an optimised program as `jax.stages.Compiled.as_text()` prints it."""
    computations: dict[str, Computation] = {}
    entry, scope = "", {}
    for line in text.splitlines():
        if heading := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
            scope = computations[heading[2]] = {}
            entry = heading[2] if heading[1] else entry
        elif instruction := _instruction(line):
            scope[instruction.name] = instruction
    partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%([\w.\-]+) = (.*)", re.sub(r"/\*.*?\*/", "", line))
    opcode = found and re.search(r" ([a-z][\w\-]*)\(", found[3])  # shapes have no blank before (
    if not found or not opcode:
        return None
    end = _closing(found[3], opcode.end())
    return Instruction(
        name=found[2],
        root=bool(found[1]),
        shape=found[3][: opcode.start()],
        opcode=opcode[1],
        inside=found[3][opcode.end() : end],
        attributes=found[3][end + 1 :],
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that was opened before `start` is closed."""
    depth = 1
    for bracket in re.finditer(r"[()]", text[start:]):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return start + bracket.start()
    return len(text)


def visits(program: Program) -> Iterator[Visit]:
    """Everything that one run of the program runs; of conditionals every branch."""
    yield from _walk(program, program.entry, times=1, fused=False)


def _walk(program: Program, name: str, times: int, fused: bool) -> Iterator[Visit]:
    scope = program.computations[name]
    for instruction in scope.values():
        yield Visit(instruction, times, scope, fused)
        repeats = trips(program, instruction) if instruction.opcode == "while" else 1
        for called in _called(instruction):
            # What is run aside (async) is a fusion or a slice: its -done counts what it moves.
            inner = fused or instruction.opcode in ("fusion", "async-start")
            yield from _walk(program, called, times * repeats, inner)


# Attributes that name what an instruction runs as a program; what it applies to each element, as
# the sum of a reduction, moves no memory of its own.
_CALLS = {
    "while": r"body=%([\w.\-]+)",
    "call": r"to_apply=%([\w.\-]+)",
    "fusion": r"calls=%([\w.\-]+)",
    "async-start": r"calls=%([\w.\-]+)",
    "conditional": r"(?:branch_computations=\{|_computation=)([^}=]*)",
}


def _called(instruction: Instruction) -> list[str]:
    pattern = _CALLS.get(instruction.opcode)
    found = re.findall(pattern, instruction.attributes) if pattern else []
    if instruction.opcode == "conditional":
        return re.findall(r"%([\w.\-]+)", " ".join(found))
    return found


def trips(program: Program, loop: Instruction) -> int:
    """How often a loop runs; 1 if the program does not say.

    CPU and GPU programs note it. Those of TPU do not, but a loop of fixed length counts from 0 by 1
    (that is what `jax.lax.scan` makes) while it is below a constant.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", loop.attributes)
    scope = program.computations[condition[1]] if condition else {}
    test = next((i for i in scope.values() if i.root), None)
    if test is None or "direction=LT" not in test.attributes:
        return 1
    limit = scope.get(test.operands[-1])
    counts = limit is not None and limit.opcode == "constant" and limit.inside.isdigit()
    return int(limit.inside) if limit and counts else 1


def size_of(shape: str) -> int:
    """Bytes of an array, or of all in a tuple, of a shape as the compiler writes it."""
    bits = 0
    for kind, dims in re.findall(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]", shape):
        width = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])  # type: ignore[index]
        bits += width * math.prod(int(dim) for dim in dims.split(",") if dim)
    return bits // 8


# --- Bytes of memory ---

# What moves nothing: names for what is there already, and what runs other instructions.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "while conditional call".split()
)
_PARTIAL = ("slice", "dynamic-slice", "gather")


def bytes_accessed(program: Program) -> int:
    """Bytes that one device reads from its main memory and writes to it in one run.

    Of each instruction and each fusion, what it takes and what it gives; of an array that it takes
    a part of, or changes a part of in place, that part. What a TPU holds on the chip, and what
    stands in the host's memory, does not count: the compiler marks it by a memory space, S(n). What
    a kernel of attention reads several times counts once.
    """
    return sum(_traffic(program, v) * v.times for v in visits(program) if not v.fused)


def _traffic(program: Program, visit: Visit) -> int:
    instruction, scope = visit.instruction, visit.scope
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-start", "-update")):
        return 0
    taken = [scope[name] for name in instruction.operands if name in scope]
    given = _main(instruction.shape)
    if instruction.opcode.endswith("-done"):  # of what its -start took, as much as it gives
        sources = [scope[name].shape for start in taken for name in start.operands if name in scope]
        return given + min(sum(map(_main, sources)), size_of(instruction.shape))
    if instruction.opcode in _PARTIAL:
        return given + min(_main(taken[0].shape), size_of(instruction.shape))
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _main(taken[1].shape)
    if instruction.opcode == "fusion":
        return _fusion_traffic(program.computations[_called(instruction)[0]], taken, given)
    return given + sum(_main(operand.shape) for operand in taken)


def _fusion_traffic(fused: Computation, taken: list[Instruction], given: int) -> int:
    users: dict[str, list[Instruction]] = defaultdict(list)
    for instruction in fused.values():
        for name in instruction.operands[:1] if _is_partial(instruction) else instruction.operands:
            while fused[name].opcode == "bitcast":  # another name for the same array
                name = fused[name].operands[0]
            if instruction.opcode != "bitcast":
                users[name].append(instruction)
    parameters = {i.inside: i.name for i in fused.values() if i.opcode == "parameter"}
    total = given
    for index, operand in enumerate(taken):
        uses = users[parameters[str(index)]]
        full = _main(operand.shape)
        parts = sum(_part(fused, use) for use in uses) if all(map(_is_partial, uses)) else full
        total += min(full, parts)
        if any(use.opcode == "dynamic-update-slice" for use in uses) and parts < full:
            total -= full - parts  # the result is that array: written in place, in part
    return max(total, 0)


def _is_partial(use: Instruction) -> bool:
    return use.opcode in (*_PARTIAL, "dynamic-update-slice")


def _part(fused: Computation, use: Instruction) -> int:
    """Bytes of the part that `use` takes or changes of its first operand."""
    changed = use.opcode == "dynamic-update-slice"
    return size_of(fused[use.operands[1]].shape if changed else use.shape)


def _main(shape: str) -> int:
    """Bytes of the arrays of a shape that are in the device's main memory."""
    arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", shape)
    return sum(size_of(array) for array in arrays if "S(" not in array)


# --- Bytes between devices ---


class Collective(NamedTuple):
    """Exchanges of one kind in one run. times: how many; size: bytes that each device has of their
    whole arrays; moved: bytes that each device sends."""

    kind: str
    times: int
    size: int
    moved: int


def _all_but_own(size: int, group: int) -> float:
    return size * (group - 1) / group


# What a device sends of an array of `size` bytes within a group, each part going round the ring of
# the group's devices: https://jax-ml.github.io/scaling-book/sharding. A sum is a reduce-scatter and
# an all-gather.
_SENT: dict[str, Callable[[int, int], float]] = {
    "all-gather": _all_but_own,
    "all-reduce": lambda size, group: 2 * _all_but_own(size, group),
    "reduce-scatter": _all_but_own,
    "all-to-all": _all_but_own,
    "collective-permute": lambda size, group: size,
}


def collectives(program: Program) -> list[Collective]:
    """The exchanges between devices in one run, by kind."""
    found: dict[str, Collective] = {}
    spread: set[str] = set()
    for visit in visits(program):
        kind = visit.instruction.opcode.removesuffix("-start")
        if kind not in _SENT:
            continue
        channel = re.search(r"channel_id=\d+", visit.instruction.attributes)
        if visit.fused and channel:  # TPU spreads one exchange over fusions that compute meanwhile
            if channel[0] in spread:
                continue
            spread.add(channel[0])
        one, old = _exchange(program, kind, visit), found.get(kind, Collective(kind, 0, 0, 0))
        found[kind] = Collective(
            kind,
            old.times + visit.times,
            old.size + one.size * visit.times,
            old.moved + one.moved * visit.times,
        )
    return [found[kind] for kind in _SENT if kind in found]


def _exchange(program: Program, kind: str, visit: Visit) -> Collective:
    instruction = visit.instruction
    group = group_size(instruction.attributes, program.partitions)
    taken = sum(size_of(visit.scope[name].shape) for name in instruction.operands)
    size = taken * group if kind == "all-gather" else taken
    return Collective(kind, 1, size, round(_SENT[kind](size, group)))


def group_size(attributes: str, partitions: int) -> int:
    """Devices that exchange with each other: `replica_groups`, in any of the ways that it is
    written, {{0,1},{2,3}}, [2,2]<=[4] (groups, devices of one) or mesh['a'=2,'b'=2] {'b'}, which
    may say in between in what order the devices are; {} for all.

    Raises:
      ValueError: it is written in another way.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(counted[1])
    mesh = r"replica_groups=\w+\[([^\]]*)\](?:, device_ids=[^{]*)? \{([^}]*)\}"
    if named := re.search(mesh, attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])  # 'a':(1)2 is a part of 'a'
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "replica_groups=" in attributes and "replica_groups={}" not in attributes:
        raise ValueError(f"replica_groups in an unknown form: {attributes[:200]}")
    return partitions
