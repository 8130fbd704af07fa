# Copyright © 2026 MLX Contributors

import contextlib
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from test_dpo_command import CommandCase, command
from tiny import random_pairs, tiny_model

from mlx_lm.preference.device import device_memory, system_memory
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.forward import tokens
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.forward.recompute import keyed_layers
from mlx_lm.preference.memory import replay
from mlx_lm.preference.memory import trace as trace_module
from mlx_lm.preference.memory.predict import (
    MemoryEstimate,
    check_fits,
    predict_peak,
    smaller_settings,
)
from mlx_lm.preference.memory.replay import Replay, evaluation_order, task_limits
from mlx_lm.preference.memory.tape import Tape, fuse
from mlx_lm.preference.memory.trace import array_places, trace_step
from mlx_lm.preference.run import forecast
from mlx_lm.preference.run.forecast import check_test_memory, predict_test
from mlx_lm.tuner.trainer import DPOTrainingArgs

MB = 2**20
CPU = mx.default_device() == mx.cpu


def traced(fun, *args):
    tape = Tape()
    mx.export_function(tape.record, fun, *args)
    return tape


class TestDevices(unittest.TestCase):
    """What is traced where kernels run."""

    def test_kernels_are_left_out_and_put_back(self):
        kernel = mock.Mock(return_value=None)
        with mock.patch.object(tokens, "KERNELS", [kernel]):
            score = lambda: tokens.token_logps(mx.zeros((1, 3)), mx.array([0]))
            forecast.plain(score)()
            self.assertFalse(kernel.called)
            with self.assertRaises(ZeroDivisionError):
                forecast.plain(lambda: 1 / 0)()
            score()
            self.assertTrue(kernel.called)

    def test_what_a_gpu_cannot_export_is_traced_as_on_a_cpu(self):
        devices, double = [], lambda x: 2 * x

        def failing(fn, *given):
            devices.append(mx.default_device())
            if len(devices) == 1:
                raise ValueError("[export_function] Unable to get state for primitive")
            return trace(fn, *given)

        trace = trace_module._trace
        with (
            mock.patch.object(trace_module, "_trace", failing),
            mock.patch.object(mx, "default_device", lambda: mx.gpu),
        ):
            found = trace_step(double, (mx.zeros((3,)),), [])
        self.assertIn("Multiply", [op.name for op in found.ops])
        self.assertEqual(len(devices), 2)

    def test_a_fused_gradient_of_attention_keeps_no_square(self):
        def peak(length, on_cuda):
            q, k = (mx.zeros((2, heads, length, 32), mx.bfloat16) for heads in (4, 2))
            attend = lambda q, k, v: mx.fast.scaled_dot_product_attention(
                q, k, v, scale=0.1, mask="causal"
            )
            layers = lambda q, k, v: attend(attend(q, k, v), k, v).sum()
            step = lambda arrays: mx.value_and_grad(lambda x: layers(*x))(arrays)
            with (
                mock.patch.object(mx.cuda, "is_available", lambda: on_cuda),
                mock.patch.object(mx, "default_device", lambda: mx.gpu),
                mock.patch.object(replay, "task_limits", lambda: (1, 1 << 40)),
            ):
                return predict_peak(step, ([q, k, k],), [], False).total

        self.assertLess(peak(2048, True), 2.1 * peak(1024, True))
        self.assertGreater(peak(2048, False), 3.5 * peak(1024, False))
        # Of another length it is not fused.
        self.assertGreater(peak(2047, True), 5 * peak(2048, True))
        # Whatever is given and computed is held: three arrays, two results.
        sizes = 2 * 2048 * 32 * 2 * (4 + 2 * 2 + 2 * 4)
        self.assertGreater(peak(2048, True), sizes)

    @unittest.skipUnless(CPU, "any other error is the CPU's own")
    def test_an_error_of_the_cpu_is_its_own(self):
        refuse = mock.Mock(side_effect=ValueError("[export_function] no"))
        with mock.patch.object(trace_module, "_trace", refuse):
            with self.assertRaises(ValueError):
                trace_step(lambda x: x, (mx.zeros((3,)),), [])
        self.assertEqual(refuse.call_count, 1)


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def __call__(self, x):
        return x + self.down(nn.silu(self.up(x)))


class Model(nn.Module):
    def __init__(self, size=256):
        super().__init__()
        self.layers = [Block(size) for _ in range(6)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def training_step(model, optimizer):
    def step(x):
        parameters = model.trainable_parameters()
        loss, gradients = nn.value_and_grad(model, lambda x: model(x).sum())(x)
        model.update(parameters)
        optimizer.update(model, gradients)
        return loss

    return step


def measured_peak(step, args, state):
    """The worst of three compiled steps, over what was there before."""
    state = [*state, mx.random.state]
    compiled = mx.compile(step, inputs=state, outputs=state)
    mx.eval(state, args)
    arrays = [x for _, x in tree_flatten([state, args]) if isinstance(x, mx.array)]
    own = {id(x): x.nbytes for x in arrays}
    others = mx.get_active_memory() - sum(own.values())
    peaks = []
    for _ in range(3):
        mx.reset_peak_memory()
        mx.eval(compiled(*args), state)
        peaks.append(mx.get_peak_memory() - others)
    return max(peaks)


class TestPrediction(unittest.TestCase):
    def setUp(self):
        self.model, self.optimizer = Model(), optim.Adam(1e-4)
        self.optimizer.init(self.model.trainable_parameters())
        self.state = [self.model.state, self.optimizer.state]
        self.step = training_step(self.model, self.optimizer)

    @unittest.skipUnless(CPU, "how far a GPU runs ahead depends on its speed")
    def test_matches_the_allocator(self):
        x = mx.zeros((2048, 256))
        totals = []
        for checkpoint in (False, True):
            with self.subTest(checkpoint=checkpoint):
                with keyed_layers(self.model, checkpoint):
                    estimate = predict_peak(self.step, (x,), self.state)
                    peak = measured_peak(self.step, (x,), self.state)
                totals.append(estimate.total)
                self.assertLess(abs(estimate.total / peak - 1), 0.15)
        self.assertLess(totals[1], totals[0])

    def test_nothing_is_computed_or_left_behind(self):
        before = [x for _, x in tree_flatten(self.state)]
        active, checkpoint = mx.get_active_memory(), mx.checkpoint
        with keyed_layers(self.model, True):
            predict_peak(self.step, (mx.zeros((64, 256)),), self.state)
        after = [x for _, x in tree_flatten(self.state)]
        self.assertTrue(all(x is y for x, y in zip(before, after, strict=True)))
        self.assertLess(mx.get_active_memory() - active, 1000)
        self.assertIs(mx.checkpoint, checkpoint)
        mx.eval(after)

    def test_state_is_put_back_after_an_error(self):
        layer = nn.Linear(2, 2)
        weight = layer.weight
        before = {**vars(mx), **vars(mx.distributed)}

        def fail(x):
            layer.weight = layer.weight + x
            raise KeyError("stop")

        with self.assertRaises(KeyError):
            predict_peak(fail, (mx.array(1.0),), [layer])
        self.assertIs(layer.weight, weight)
        after = {**vars(mx), **vars(mx.distributed)}
        self.assertEqual([k for k in before if after[k] is not before[k]], [])

    def test_state_that_is_exchanged(self):
        state = {"w": {"a": mx.zeros((4,))}}
        inner = state["w"]

        def step(x):
            state["w"] = {"a": state["w"]["a"] + x}
            return x

        self.assertEqual(predict_peak(step, (mx.array(1.0),), [state]).optimizer, 16)
        self.assertIs(state["w"], inner)

        def grow(x):
            state["b"] = x

        with self.assertRaisesRegex(ValueError, "initialize the optimizer"):
            predict_peak(grow, (mx.array(1.0),), [state])
        self.assertEqual(list(state), ["w"])

    def test_parts(self):
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
        model.layers[0].freeze()
        start = dict(tree_flatten(model.trainable_parameters()))
        optimizer = optim.Adam(0.1)
        optimizer.init(model.trainable_parameters())

        def step(x):
            loss = lambda x: model(x).sum()
            gradients = nn.value_and_grad(model, loss)(x)[1]
            optimizer.update(model, gradients)
            return start

        state = [model, optimizer.state, start]
        estimate = predict_peak(step, (mx.zeros((1, 8)),), state)
        self.assertEqual((estimate.weights, estimate.trained), (256, 128))
        # Adam's two moments, its step and rate; the start shares its array now,
        # but won't after the first update.
        self.assertEqual(estimate.reference, 128 + 4)
        self.assertEqual(estimate.optimizer, 2 * 128 + 8)
        parts = vars(estimate).values()
        self.assertEqual(estimate.total, sum(parts))

    def test_shared_arrays_count_once(self):
        a, b = nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)
        b.weight = a.weight
        estimate = predict_peak(lambda x: b(a(x)), (mx.zeros((1, 256)),), [a, b])
        self.assertEqual(estimate.weights, 256 * 256 * 4)

    def test_custom_gradients_are_part_of_it(self):
        def cost(elements):
            def loss(x):
                @mx.custom_function
                def double(x):
                    return 2 * x

                @double.vjp
                def double_vjp(x, cotangent, output):
                    return cotangent * (
                        mx.ones((elements,)).cumsum() @ mx.ones(elements)
                    )

                return double(x).sum()

            step = lambda x: mx.value_and_grad(loss)(x)
            return predict_peak(step, (mx.zeros((4,)),), []).total

        self.assertGreater(cost(MB) - cost(2), 4 * MB)

    def test_an_operation_that_cannot_be_traced(self):
        @mx.custom_function
        def made_before(x):
            return 2 * x

        made_before.vjp(lambda x, cotangent, output: cotangent)
        step = lambda x: mx.value_and_grad(lambda x: made_before(x).sum())(x)
        with mx.stream(mx.cpu), self.assertRaisesRegex(ValueError, "export_function"):
            predict_peak(step, (mx.zeros((4,)),), [])

    def test_a_gradient_made_outside_of_the_step(self):
        gradient = mx.value_and_grad(lambda x: mx.checkpoint(mx.sin)(x).sum())
        with self.assertRaisesRegex(ValueError, "inside the step"):
            predict_peak(gradient, (mx.zeros((4,)),), [])


class TestTape(unittest.TestCase):
    def test_tie_puts_in_order(self):
        tape = traced(lambda x, y: mx.exp(y) @ mx.sin(x), *[mx.zeros((2, 2))] * 2)
        x, y = tape.inputs
        tape.tie({y: x})
        self.assertTrue(all(y not in op.inputs for op in tape.ops))
        tape.ops.reverse()
        tape.tie({})
        self.assertEqual([op.name for op in tape.ops], ["Exp", "Sin", "Matmul"])
        self.assertEqual(tape.nbytes(x), 16)

    def test_fusion_stops_where_others_read(self):
        x = mx.zeros((4, 4))
        tape = traced(lambda x: mx.exp(mx.sin(x) * x), x)
        fuse(tape)
        self.assertEqual([op.name for op in tape.ops], ["Compiled"])
        tape = traced(lambda x: (y := mx.sin(x)) @ mx.exp(mx.cos(y)), x)
        fuse(tape)
        self.assertEqual([op.name for op in tape.ops], ["Sin", "Compiled", "Matmul"])

    def test_order_is_reversed_breadth_first(self):
        def fun(x):
            return mx.exp(mx.sin(x)) @ mx.cos(x)

        order = [op.name for op in evaluation_order(traced(fun, mx.zeros((2, 2))))]
        self.assertEqual(order, ["Sin", "Cos", "Exp", "Matmul"])

    def test_places(self):
        tree = [{"a": mx.array(1)}, (mx.array(2),), [mx.array(3), None]]
        places = list(array_places(tree))
        self.assertEqual([key for _, key, _ in places], ["a", 0])
        tape = trace_step(lambda x: x + tree[0]["a"], (mx.array(1),), tree)
        self.assertEqual(len(tape.inputs), 3)
        self.assertEqual([op.name for op in tape.ops], ["Add"])


class TestReplay(unittest.TestCase):
    def peak(self, fun, *args, keep=True):
        with mx.stream(mx.cpu):
            tape = traced(fun, *args)
            return Replay(tape, set(tape.inputs) if keep else set()).run() / (4 * MB)

    def test_views_are_free(self):
        x = mx.zeros((1024, 1024))
        views = lambda x: mx.broadcast_to(x.T[None, 2:], (3, 1022, 1024))[:, :10]
        self.assertEqual(self.peak(views, x), 1)
        # A transposed array can't be flattened in place.
        self.assertEqual(self.peak(lambda x: x.T.reshape(-1), x), 2)

    def test_buffers_are_taken_over(self):
        x = mx.zeros((1024, 1024))
        self.assertEqual(self.peak(lambda x: mx.sin(mx.exp(x)), x), 2)
        self.assertEqual(self.peak(lambda x: mx.sin(mx.exp(x)), x, keep=False), 1)

    def test_work_runs_ahead(self):
        # Nothing is freed before the tasks that read it must have ended.
        def fun(x):
            for _ in range(30):
                x = x @ x
            return x

        self.assertEqual(self.peak(fun, mx.zeros((1024, 1024))), 31)

    def test_limits(self):
        with mx.stream(mx.cpu):
            self.assertIsNone(task_limits())


class TestTests(CommandCase):
    def test_what_cannot_fit_is_refused(self):
        """On the CPU, MLX ends a process that gets no memory without a word."""
        self.succeed(*self.flags())
        for flags in ((), ("--adapter-path", "")):
            test = self.flags("--test", *flags, train=False)
            with mock.patch.object(forecast, "device_memory", return_value=10**5):
                code, _, err = command(*test)
            self.assertEqual(code, 2)
            self.assertRegex(err, r"\AError: The run needs about 0.0 GB .* has 0.0 GB")
            self.assertEqual(command(*test)[0], 0)

    def test_a_tenth_is_kept_free_on_the_cpu(self):
        model, pairs = tiny_model("lora"), random_pairs(8)
        args = DPOTrainingArgs(batch_size=2, sharing="equal")
        given = model, FrozenStart(model), pairs, args
        total = predict_test(*given).total
        self.assertGreater(total, 0)
        for share, fits in ((1.05, False), (1.2, True)):
            limit = int(share * total)
            with mock.patch.object(forecast, "device_memory", return_value=limit):
                with (
                    contextlib.nullcontext() if fits else self.assertRaises(InputError)
                ):
                    check_test_memory(*given)


class TestAdvice(unittest.TestCase):
    def test_a_4_bit_model_leaves_a_reference_as_it_is(self):
        policy, pairs = tiny_model("lora"), random_pairs(4)
        reference = tiny_model(seed=1, intermediate_size=4096)
        given = optim.SGD(0.1), pairs, DPOTrainingArgs(batch_size=1)
        frozen = sum(x.nbytes for _, x in tree_flatten(policy.parameters()))
        for other, share in ((FrozenStart(policy), 0.5), (reference, 2.0)):
            total = forecast.predict_run(policy, other, *given).total
            limit = (total - share * frozen) / (0.9 if CPU else 1)
            with mock.patch.object(forecast, "device_memory", lambda: int(limit)):
                with self.assertRaises(InputError) as caught:
                    forecast.check_memory(policy, other, *given)
            self.assertEqual("a 4-bit model" in str(caught.exception), share < 1)


class TestLimits(unittest.TestCase):
    def test_memory_limit_counts(self):
        before = mx.set_memory_limit(MB)
        try:
            self.assertEqual(device_memory(), MB)
            self.assertEqual(device_memory(), MB)
        finally:
            mx.set_memory_limit(before)
        self.assertGreater(device_memory(), MB)

    def test_containers_count(self):
        """``MemAvailable`` is the machine's: a control group may leave less."""
        meminfo = {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {MB} kB\n"}
        v2 = {"proc/self/cgroup": "0::/a/b\n"}
        group = {
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/memory.max": f"{600 * MB}\n",
            "sys/fs/cgroup/a/memory.current": f"{400 * MB}\n",
            "sys/fs/cgroup/a/memory.stat": f"anon 9\nactive_file {30 * MB}\n"
            f"inactive_file {70 * MB}\n",
        }
        deep = {
            "sys/fs/cgroup/a/b/memory.max": f"{200 * MB}\n",
            "sys/fs/cgroup/a/b/memory.current": "0\n",
            "sys/fs/cgroup/a/b/memory.stat": "active_file 0\n",
        }
        # A container that sees the host's path, and its own group as the root.
        root = "sys/fs/cgroup/memory/memory"
        v1 = {
            "proc/self/cgroup": "5:cpu:/\n4:hugetlb,memory:/docker/0123\n0::/\n",
            f"{root}.limit_in_bytes": f"{500 * MB}\n",
            f"{root}.usage_in_bytes": f"{100 * MB}\n",
            f"{root}.stat": f"inactive_file 1\ntotal_inactive_file {50 * MB}\n",
        }
        unlimited = v1 | {f"{root}.limit_in_bytes": f"{2**63 - 4096}\n"}
        for files, left in (
            ({}, 1024),
            (v2, 1024),
            (v2 | group, 300),
            (v2 | group | deep, 200),
            (v1, 450),
            (unlimited, 1024),
        ):
            with tempfile.TemporaryDirectory() as folder:
                for name, text in (meminfo | files).items():
                    file = Path(folder, name)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(text)
                held = mx.get_active_memory() + mx.get_cache_memory()
                free = system_memory(Path(folder)) - held
            self.assertEqual(free, left * MB)

    def test_smaller_settings(self):
        changes = smaller_settings({"max_seq_length": 1024})
        self.assertEqual(changes, [{"max_seq_length": 512}, {"max_seq_length": 256}])
        self.assertEqual(smaller_settings({"batch_size": 1}), [])

    def test_what_would_fit_is_named(self):
        def predict(change):
            rest = 8 * change.get("batch_size", 4) / 4
            rest /= 2 if change.get("grad_checkpoint") else 1
            return MemoryEstimate(10**9, 0, 0, 0, int(rest * 1e9))

        changes = smaller_settings({"batch_size": 4, "grad_checkpoint": False})
        estimate = predict({})
        check_fits(estimate, None)
        check_fits(estimate, estimate.total)
        for limit, advice in (
            (5, "with grad_checkpoint: true or batch_size: 2."),
            (3, "with batch_size: 1."),
            (2, "with grad_checkpoint: true with batch_size: 1."),
            (1, "No smaller setting that was tried would fit"),
        ):
            with self.subTest(limit=limit), self.assertRaisesRegex(ValueError, advice):
                check_fits(estimate, limit * 10**9, changes, predict)
        with self.assertRaisesRegex(
            ValueError, "8.4 GB.* or batch_size: 2 or a 4-bit model."
        ):
            others = [("more", lambda: 8.5e9), ("a 4-bit model", lambda: 8.3e9)]
            check_fits(estimate, int(8.4e9), changes, predict, others)


if __name__ == "__main__":
    unittest.main()
