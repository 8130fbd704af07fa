# Copyright © 2026 MLX Contributors

"""A traced step followed through MLX's scheduler and allocator."""

import os
from collections import Counter, deque
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from .tape import BINARY, UNARY, Op, Tape

# MLX's own limits: how wide it schedules, and how many tasks scheduling runs ahead
# of execution, while their buffers stay.
MAX_WIDTH = 20
MAX_ACTIVE_TASKS = 10
DONATION_EXTRA = 16384
# Where MLX, too, reads how many operations make a task.
OPERATIONS = "MLX_MAX_OPS_PER_BUFFER"
# The operations and the 2**20 input elements that make a task of a GPU.
METAL_TASKS = {"p": (20, 40), "g": (40, 40), "s": (50, 50), "d": (50, 50)}
CUDA_TASKS = dict(sm_80=(20, 400), sm_90=(30, 400), sm_100=(50, 500), sm_121=(20, 25))
ELEMENTWISE = UNARY | BINARY | {"Select", "Compiled"}
RESHAPES = frozenset("Reshape Flatten Unflatten ExpandDims Squeeze".split())
SAME_LAYOUT = frozenset("Copy StopGradient Depends CustomTransforms View".split())
DONATING = frozenset(
    "Softmax Scatter ScatterAxis SliceUpdate DynamicSliceUpdate Scan Sort".split()
)
MATMULS = frozenset("Matmul AddMM QuantizedMatmul GatherMM GatherQMM".split())


def evaluation_order(tape: Tape) -> list[Op]:
    """The operations as ``mx.eval`` orders them: breadth first, and reversed."""
    makers = {name: op for op in tape.ops for name in op.outputs}
    root = Op("Synchronizer", [], tape.outputs, [])
    missing: Counter = Counter()
    seen, stack = set(), [root]
    while stack:
        for name in stack.pop().inputs:
            if (source := makers.get(name)) is None:
                continue
            missing[source] += 1
            if source not in seen:
                seen.add(source)
                stack.append(source)
    order, i = [root], 0
    waiting: list[tuple[Op, int]] = []
    while i < len(order) or waiting:
        if i < len(order):
            op, start = order[i], 0
            i += 1
        else:
            op, start = waiting.pop()
        for j in range(start, len(op.inputs)):
            if (source := makers.get(op.inputs[j])) is None:
                continue
            if len(order) - i >= MAX_WIDTH:
                waiting.append((op, j))
                break
            missing[source] -= 1
            if not missing[source]:
                order.append(source)
    return order[:0:-1]


@dataclass(eq=False)
class _Buffer:
    size: int
    holders: int = 0


@dataclass
class _Layout:
    """Where the elements of an array lie in its buffer."""

    buffer: _Buffer
    shape: tuple
    strides: tuple

    def __post_init__(self):
        pairs = [(n, s) for n, s in zip(self.shape, self.strides) if n > 1]
        self.dense = [(n, abs(s)) for n, s in pairs if s]
        self.elements = prod(n for n, _ in self.dense)
        span = 1 + sum((n - 1) * s for n, s in self.dense)
        self.contiguous = span == self.elements
        unbroken = self.contiguous and len(pairs) == len(self.dense)
        strides = [s for _, s in pairs]
        self.rows = unbroken and strides == sorted(strides, reverse=True)
        self.columns = unbroken and strides == sorted(strides)


def _row_strides(shape):
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _reshaped(layout, shape):
    """The strides of a reshaped view, or None where elements must be moved."""
    runs: list[tuple] = []
    for size, stride in zip(layout.shape, layout.strides):
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        elif size != 1:
            runs.append((size, stride))
    strides = []
    left, stride = runs.pop() if runs else (1, 1)
    for size in reversed(shape):
        if size != 1 and left == 1 and runs:
            left, stride = runs.pop()
        if left % size:
            return None
        strides.append(stride)
        left, stride = left // size, stride * size
    return tuple(strides[::-1])


def _broadcasted(layout, shape):
    missing = len(shape) - len(layout.shape)
    sizes = zip(layout.shape, layout.strides, shape[missing:])
    return (0,) * missing + tuple(s if n == m else 0 for n, s, m in sizes)


def task_limits() -> tuple[int, int] | None:
    """How much the device does as one task, whose buffers are freed together."""
    if mx.default_device() != mx.gpu:
        return None
    architecture = str(mx.device_info(mx.gpu)["architecture"])
    if mx.metal.is_available():
        operations, elements = METAL_TASKS.get(architecture[-1], (40, 40))
    else:
        operations, elements = CUDA_TASKS.get(architecture, (20, 100))
        if os.environ.get("MLX_USE_CUDA_GRAPHS") == "0":
            # Elements are counted for graphs alone.
            elements = 1 << 40
    return (
        int(os.environ.get(OPERATIONS, operations)),
        int(os.environ.get("MLX_MAX_MB_PER_BUFFER", elements)),
    )


class _Clock:
    """Which tasks must have ended, at the latest, when another one begins."""

    def __init__(self):
        self.limits = task_limits()
        self.dispatches = self.started = 0
        self.elements, self.read = 0, set()

    def finish(self, layouts):
        """End of an operation: begins a new task if this one is full."""
        if self.limits is None:
            # The CPU's operations end with a dispatch that lets go of buffers.
            self.dispatches += 1
            self.started = self.dispatches // 10
            return (self.dispatches - 1) // 10
        for layout in layouts:
            if layout.buffer not in self.read:
                self.read.add(layout.buffer)
                self.elements += layout.elements
        task, (operations, elements) = self.started, self.limits
        if self.dispatches > operations or self.elements >> 20 > elements:
            self.started += 1
            self.dispatches = self.elements = 0
            self.read.clear()
        return task


class Replay:
    """Follows a step's buffers through the allocator."""

    def __init__(self, tape: Tape, kept: set[str]):
        self.tape = tape
        self.active = self.peak = 0
        self.clock = _Clock()
        self.layouts: dict[str, _Layout] = {}
        self.in_flight: deque = deque()
        self.order = evaluation_order(tape)
        self.uses = Counter(name for op in self.order for name in op.inputs)
        self.uses.update({*tape.outputs, *kept, *tape.constants})
        for name in [*tape.inputs, *sorted(tape.constants)]:
            self._place(name, self._allocate(tape.nbytes(name)))

    def run(self) -> int:
        for op in self.order:
            ended = self.clock.started - MAX_ACTIVE_TASKS - 1
            while self.in_flight and self.in_flight[0][0] <= ended:
                for buffer in self.in_flight.popleft()[1]:
                    self._release(buffer)
            held = self._evaluate(op)
            sources = [self.layouts[name] for name in op.inputs]
            others = {x.buffer for x in sources}
            others |= {self.layouts[name].buffer for name in op.outputs[:-1]}
            others -= {self.layouts[op.outputs[-1]].buffer}
            for buffer in others:
                buffer.holders += 1
            self.in_flight.append((self.clock.finish(sources), [*held, *others]))
            for name in op.inputs:
                self._drop(name)
            for name in op.outputs:
                if not self.uses[name]:
                    self._release(self.layouts[name].buffer)
        return self.peak

    def _allocate(self, size):
        self.active += size
        self.peak = max(self.peak, self.active)
        return _Buffer(size)

    def _release(self, buffer):
        buffer.holders -= 1
        if not buffer.holders:
            self.active -= buffer.size

    def _drop(self, name):
        self.uses[name] -= 1
        if not self.uses[name]:
            self._release(self.layouts[name].buffer)

    def _place(self, name, buffer, strides=None):
        shape = self.tape.shapes[name]
        buffer.holders += 1
        strides = _row_strides(shape) if strides is None else strides
        self.layouts[name] = _Layout(buffer, shape, strides)

    def _new(self, name, size=None, strides=None):
        size = self.tape.nbytes(name) if size is None else size
        self._place(name, self._allocate(size), strides)

    def _donatable(self, source, target):
        layout = self.layouts[source]
        return (
            self.uses[source] == 1
            and layout.buffer.holders == 1
            and self.tape.itemsizes[source] == self.tape.itemsizes[target]
            and layout.buffer.size <= self.tape.nbytes(target) + DONATION_EXTRA
        )

    def _evaluate(self, op):
        """Place the outputs of one operation; returns its scratch buffers."""
        source = self.layouts[op.inputs[0]] if op.inputs else None
        temporaries: list[_Buffer] = []
        if op.name in SAME_LAYOUT:
            first = 0 if op.name == "Depends" else -len(op.outputs)
            for name, other in zip(op.outputs, op.inputs[first:]):
                layout = self.layouts[other]
                self._place(name, layout.buffer, layout.strides)
            return temporaries
        strides = self._view_strides(op, source)
        if strides is not None:
            for name in op.outputs:
                self._place(name, source.buffer, strides)
            return temporaries
        self.clock.dispatches += 1
        if op.name in ELEMENTWISE:
            self._elementwise(op)
            return temporaries
        if op.name in MATMULS:
            for name in op.inputs[:2]:
                rows, columns = self.tape.shapes[name][-2:]
                if self.layouts[name].strides[-2:] not in ((columns, 1), (1, rows)):
                    # A packed copy for the length of the operation.
                    self.clock.dispatches += 1
                    temporaries.append(self._allocate(self.tape.nbytes(name)))
                    temporaries[-1].holders += 1
        elif op.name in DONATING and source.rows:
            if self._donatable(op.inputs[0], op.outputs[0]):
                self._place(op.outputs[0], source.buffer, source.strides)
                return temporaries
        for name in op.outputs:
            self._new(name)
        return temporaries

    def _view_strides(self, op, source):
        """The strides of an output that shares its input's buffer, or None."""
        shape = self.tape.shapes[op.outputs[0]]
        if op.name in RESHAPES:
            return _row_strides(shape) if source.rows else _reshaped(source, shape)
        if op.name == "Transpose":
            return tuple(source.strides[axis] for axis in op.arguments[0])
        if op.name in ("Broadcast", "BroadcastAxes"):
            return _broadcasted(source, shape)
        if op.name == "Split" or (op.name == "Contiguous" and source.rows):
            return source.strides
        if op.name == "Slice":
            return tuple(s * n for s, n in zip(source.strides, op.arguments[2]))
        return tuple(op.arguments[1]) if op.name == "AsStrided" else None

    def _elementwise(self, op):
        """Outputs take over an input's buffer, or its layout."""
        arrays = [n for n in op.inputs if n not in self.tape.constants]
        full = [n for n in arrays if self.layouts[n].elements > 1]
        layouts = [self.layouts[n] for n in full]
        shape = self.tape.shapes[op.outputs[0]]
        one = len(layouts) == 1 and layouts[0].contiguous
        alike = all(x.rows for x in layouts) or all(x.columns for x in layouts)
        dense = (one or alike) and all(x.shape == shape for x in layouts)
        if not layouts and op.name != "Compiled":
            for name in op.outputs:
                self._new(name, self.tape.itemsizes[name], (0,) * len(shape))
            return
        # Every output of a kernel refers to all its inputs: with several outputs
        # no input is free.
        free = full if len(op.outputs) == 1 else []
        free = [n for n in free if dense or self.layouts[n].rows]
        for name in op.outputs:
            donor = next((n for n in free if self._donatable(n, name)), None)
            if donor is not None:
                layout = self.layouts[donor]
                self._place(name, layout.buffer, layout.strides)
            elif dense and layouts:
                size = layouts[0].elements * self.tape.itemsizes[name]
                self._new(name, size, layouts[0].strides)
            else:
                self._new(name)
