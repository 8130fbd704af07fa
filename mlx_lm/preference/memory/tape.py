# Copyright © 2026 MLX Contributors

"""The operations of a traced step, merged into the kernels that run them."""

from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import Any

# MLX's own limits, and what it merges.
MAX_FUSED_DEPTH = 11
MAX_FUSED_INPUTS = 24
UNARY = frozenset(
    "Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh AsType Ceil Cos Conjugate Cosh "
    "Remainder Erf ErfInv Exp Floor Log Log2 Log10 Log1p LogicalNot Negative Round "
    "Sigmoid Sign Sin Sinh Square Sqrt Tan Tanh Expm1 Real Imag "
    "BitwiseInvert".split()
)
BINARY = frozenset(
    "Add Divide Equal NaNEqual Greater GreaterEqual Less LessEqual LogicalAnd "
    "LogicalOr LogAddExp Maximum Minimum Multiply NotEqual Power Subtract "
    "BitwiseBinary BitwiseAnd BitwiseOr BitwiseXor LeftShift RightShift "
    "ArcTan2".split()
)
FUSABLE = UNARY | BINARY | {"Select", "Broadcast"}


@dataclass(eq=False)
class Op:
    """One operation: its name, arguments, and the names of its arrays."""

    name: str
    arguments: list
    inputs: list[str]
    outputs: list[str]


@dataclass
class Tape:
    """A traced function: every operation, and the shape and type of every array."""

    ops: list[Op] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    constants: set[str] = field(default_factory=set)
    shapes: dict[str, tuple] = field(default_factory=dict)
    itemsizes: dict[str, int] = field(default_factory=dict)

    def record(self, entry: dict[str, Any]) -> None:
        """Take one entry of ``mx.export_function``'s callback."""
        kind = entry["type"]
        if kind in ("inputs", "outputs"):
            self._know(entry[kind])
            getattr(self, kind).extend(name for name, *_ in entry[kind])
        elif kind == "constants":
            self._know((n, a.shape, a.dtype) for n, a in entry[kind])
            self.constants.update(name for name, _ in entry[kind])
        elif kind == "primitive":
            self._know([*entry["inputs"], *entry["outputs"]])
            names = [[n for n, *_ in entry[k]] for k in ("inputs", "outputs")]
            self.ops.append(Op(entry["name"], entry["arguments"], *names))

    def _know(self, arrays):
        for name, shape, dtype in arrays:
            self.shapes[name] = tuple(shape)
            self.itemsizes[name] = dtype.size

    def tie(self, names: dict[str, str]) -> None:
        """Read other arrays in the place of some, and put the operations in order."""

        def follow(name):
            while name in names:
                name = names[name]
            return name

        for op in self.ops:
            op.inputs = [follow(name) for name in op.inputs]
        self.outputs = [follow(name) for name in self.outputs]
        makers = {name: op for op in self.ops for name in op.outputs}
        ordered, seen = [], set()
        path: list = [(None, iter(self.outputs))]
        while path:
            op, sources = path[-1]
            for name in sources:
                maker = makers.get(name)
                if maker is not None and maker not in seen:
                    seen.add(maker)
                    path.append((maker, iter(maker.inputs)))
                    break
            else:
                path.pop()
                if op is not None:
                    ordered.append(op)
        self.ops = ordered

    def nbytes(self, name: str) -> int:
        return prod(self.shapes[name]) * self.itemsizes[name]


class _Fuser:
    """Merges elementwise operations as ``mx.compile`` does."""

    def __init__(self, tape):
        self.tape = tape
        self.outputs = set(tape.outputs)
        self.makers = {name: op for op in tape.ops for name in op.outputs}
        self.readers = defaultdict(list)
        for op in tape.ops:
            for name in op.inputs:
                if name in self.makers:
                    self.readers[name].append(op)

    def run(self):
        done, fused = set(), []
        for op in reversed(self.tape.ops):
            if op in done:
                continue
            members, group = {}, [op]
            if op.name in FUSABLE and op.name != "Broadcast":
                name = op.outputs[0]
                self._collect(name, 0, self.tape.shapes[name], members, set())
                group = list(members.values())
            if len(group) <= 1:
                fused.append(op)
                continue
            done.update(group)
            fused.append(self._merge(op, members))
        self.tape.ops = fused[::-1]

    def _collect(self, name, depth, shape, members, pending):
        """Depth-first, the operations that one kernel can compute with the last."""
        if name in members:
            return
        op = self.makers.get(name)
        is_output = name in self.outputs
        too_far = depth >= MAX_FUSED_DEPTH or op is None or op.name not in FUSABLE
        if too_far or (is_output and self.tape.shapes[name] != shape):
            pending.add(name)
            return
        if depth and any(r.outputs[0] not in members for r in self.readers[name]):
            if op.name != "Broadcast" or len(pending) >= MAX_FUSED_INPUTS:
                pending.add(name)
                return
            op, name = self._split(op, name, members)
        if is_output:
            pending.add(name)
        else:
            pending.discard(name)
        if len(pending) >= MAX_FUSED_INPUTS:
            return
        members[name] = op
        for source in op.inputs:
            self._collect(source, depth + 1, shape, members, pending)

    def _split(self, op, name, members):
        """A second copy of a broadcast, for the readers in the kernel."""
        copy = f"{name}'{len(self.makers)}"
        twin = Op(op.name, op.arguments, list(op.inputs), [copy])
        self.tape.shapes[copy] = self.tape.shapes[name]
        self.tape.itemsizes[copy] = self.tape.itemsizes[name]
        self.makers[copy] = twin
        inside = [r for r in self.readers[name] if r.outputs[0] in members]
        for reader in inside:
            reader.inputs = [copy if n == name else n for n in reader.inputs]
        self.readers[copy] = inside
        self.readers[name] = [r for r in self.readers[name] if r not in inside]
        for source in op.inputs:
            if source in self.makers:
                self.readers[source].append(twin)
        return twin, copy

    def _merge(self, last, members):
        """The kernel: what it reads in order, and what others need of it."""
        inputs, ordered, seen = [], [], set()

        def visit(name):
            if name in seen:
                return
            seen.add(name)
            if name not in members:
                inputs.append(name)
                return
            for source in members[name].inputs:
                visit(source)
            ordered.append(name)

        visit(last.outputs[0])
        outputs = [n for n in ordered[:-1] if n in self.outputs] + [ordered[-1]]
        kernel = Op("Compiled", [], inputs, outputs)
        group = set(members.values())
        for name in self.makers.keys() & set(inputs):
            rest = [r for r in self.readers[name] if r not in group]
            self.readers[name] = rest + [kernel]
        for name in outputs:
            self.readers[name] = [r for r in self.readers[name] if r not in group]
            self.makers[name] = kernel
        return kernel


def fuse(tape: Tape) -> None:
    """Merge elementwise operations into the kernels that ``mx.compile`` makes."""
    _Fuser(tape).run()
