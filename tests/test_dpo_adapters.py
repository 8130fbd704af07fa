# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import model_zoo as zoo
import numpy as np
from mlx.utils import tree_flatten
from resuming import bits, signals
from test_dpo_command import CommandCase, command, metrics_of, write_yaml
from tiny import save_rows, save_tiny_model, tiny_model

from mlx_lm import dpo, fuse, load, lora
from mlx_lm.generate import generate
from mlx_lm.generate import main as generate_main
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.policy.adapter import adapter_config
from mlx_lm.preference.policy.model import load_model, prepare_policy
from mlx_lm.preference.policy.start import load_weights
from mlx_lm.preference.report import testing
from mlx_lm.preference.run.setup import make_policy
from mlx_lm.preference.settings.adopt import adopt_adapter_config, adopt_finished_run

TOKENS = mx.array([[0, 40, 7, 99, 150, 3, 61, 12]])
MESSAGES = [{"role": "user", "content": "Say tea."}]
KINDS = ("lora", "dora", "full", "4-bit")


def quietly(main, name, *argv):
    """Run another command's main in this process and return what it prints."""
    out = io.StringIO()
    with mock.patch.object(sys, "argv", [name, *map(str, argv)]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main()
    return out.getvalue()


def logits_of(model):
    model.eval()
    return np.array(model(TOKENS))


def loaded_logits(path, adapter_path=None):
    adapter_path = str(adapter_path) if adapter_path else None
    return logits_of(load(str(path), adapter_path=adapter_path)[0])


def watched_command(*argv):
    """Run mlx_lm.dpo: the trained model and what evaluate_model returned."""
    seen = SimpleNamespace(model=None, metrics=None)
    evaluate, train = testing.evaluate_model, dpo.train_dpo

    def watch_evaluation(*args, **kwargs):
        seen.metrics = evaluate(*args, **kwargs)
        return seen.metrics

    def watch_training(model, *args, **kwargs):
        seen.model = model
        return train(model, *args, **kwargs)

    with (
        mock.patch.object(testing, "evaluate_model", watch_evaluation),
        mock.patch.object(dpo, "train_dpo", watch_training),
    ):
        code, seen.out, seen.err = command(*argv)
    if code:
        raise AssertionError(seen.err)
    return seen


class FinishedRuns(unittest.TestCase):
    """One finished run of each kind, shared by the tests."""

    @classmethod
    def setUpClass(cls):
        shared = tempfile.TemporaryDirectory()
        cls.addClassCleanup(shared.cleanup)
        cls.root = Path(shared.name)
        cls.data = save_rows(cls.root / "data")
        plain = save_tiny_model(cls.root / "plain")
        packed = save_tiny_model(cls.root / "packed", quantize=True)
        cls.bases, cls.adapters, cls.seen = {}, {}, {}
        for kind in KINDS:
            cls.bases[kind] = packed if kind == "4-bit" else plain
            cls.adapters[kind] = cls.root / f"adapters-{kind}"
            cls.seen[kind] = watched_command(
                *("--train", "--test", *cls.run_flags(kind)),
                *("--fine-tune-type", "lora" if kind == "4-bit" else kind),
                *("--num-layers", 2, "--iters", 6, "--batch-size", 4),
                *("--learning-rate", 1e-2, "--max-seq-length", 40, "--beta", 0.3),
            )

    @classmethod
    def run_flags(cls, kind):
        return [
            *("--model", cls.bases[kind], "--data", cls.data),
            *("--adapter-path", cls.adapters[kind]),
        ]

    def test_loaded_equals_trained(self):
        for kind in KINDS:
            with self.subTest(kind=kind):
                base = self.bases[kind]
                trained = logits_of(self.seen[kind].model)
                np.testing.assert_array_equal(
                    loaded_logits(base, self.adapters[kind]), trained
                )
                self.assertGreater(np.abs(trained - loaded_logits(base)).max(), 0.01)

    def test_fused_equals_trained(self):
        for kind in KINDS:
            with self.subTest(kind=kind):
                folder = self.root / f"fused-{kind}"
                quietly(
                    *(fuse.main, "mlx_lm.fuse", "--model", self.bases[kind]),
                    *("--adapter-path", self.adapters[kind], "--save-path", folder),
                    # Packed to 4 bits again the change would be rounded away.
                    *(["--dequantize"] if kind == "4-bit" else []),
                )
                trained = logits_of(self.seen[kind].model)
                np.testing.assert_allclose(loaded_logits(folder), trained, atol=1e-4)

    def answer(self, kind, adapter_path, length):
        """What the model answers greedily, from Python."""
        adapter_path = str(adapter_path) if adapter_path else None
        model, tokenizer = load(str(self.bases[kind]), adapter_path=adapter_path)
        prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
        return generate(model, tokenizer, prompt, max_tokens=length).strip()

    def test_generate_takes_the_adapter(self):
        for kind in KINDS:
            with self.subTest(kind=kind):
                out = quietly(
                    *(generate_main, "mlx_lm.generate", "--model", self.bases[kind]),
                    *("--adapter-path", self.adapters[kind], "--max-tokens", 6),
                    *("--prompt", MESSAGES[0]["content"]),
                )
                answer = self.answer(kind, self.adapters[kind], 6)
                self.assertIn(answer or "No text generated", out)

    def test_server_answers_with_the_adapter(self):
        kind = "lora"
        expected = self.answer(kind, self.adapters[kind], 6)
        self.assertNotEqual(expected, self.answer(kind, None, 6))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlx_lm", "server", "--port", str(port)),
                *("--model", str(self.bases[kind])),
                *("--adapter-path", str(self.adapters[kind])),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            body = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0.0}
            answer = self.ask(server, port, body)
        finally:
            server.terminate()
            server.wait(timeout=30)
        message = answer["choices"][0]["message"]
        self.assertEqual(message["content"].strip(), expected)

    def ask(self, server, port, body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(300):
            self.assertIsNone(server.poll(), "the server stopped")
            try:
                with opener.open(request, timeout=60) as response:
                    return json.load(response)
            except urllib.error.URLError as e:
                if not isinstance(e.reason, ConnectionRefusedError):
                    raise
                time.sleep(0.1)
        self.fail("the server did not start")

    def test_test_alone_repeats_the_numbers(self):
        for kind in KINDS:
            with self.subTest(kind=kind):
                again = watched_command("--test", *self.run_flags(kind))
                self.assertEqual(again.metrics, self.seen[kind].metrics)
                self.assertGreater(again.metrics["rewards/margins"], 0)

    def test_test_takes_the_model_of_the_run(self):
        again = watched_command("--test", *self.run_flags("full")[2:])
        self.assertEqual(again.metrics, self.seen["full"].metrics)

    def test_given_settings_win_in_a_test(self):
        again = watched_command("--test", *self.run_flags("lora"), "--beta", 0.6)
        self.assertAlmostEqual(
            again.metrics["rewards/margins"],
            2 * self.seen["lora"].metrics["rewards/margins"],
            places=5,
        )

    def test_test_of_the_model_itself(self):
        flags = [*self.run_flags("lora")[:4], "--adapter-path", ""]
        metrics = watched_command("--test", *flags).metrics
        self.assertEqual(metrics["rewards/margins"], 0)
        self.assertEqual(metrics["perplexity/policy"], metrics["perplexity/reference"])
        self.assertAlmostEqual(
            metrics["perplexity/policy"],
            self.seen["lora"].metrics["perplexity/reference"],
            places=2,
        )

    def test_folder_that_is_no_run(self):
        flags = [*self.run_flags("lora")[:4], "--adapter-path"]
        code, _, err = command("--test", *flags, self.root / "nowhere")
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertIn("has no adapter_config.json", err)
        with self.assertRaisesRegex(ValueError, "adapter_config.json"):
            adopt_finished_run(SimpleNamespace(adapter_path=self.root))
        unfinished = self.root / "unfinished"
        shutil.copytree(self.adapters["lora"], unfinished)
        (unfinished / "adapters.safetensors").unlink()
        code, _, err = command("--test", *flags, unfinished)
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertIn("adapters.safetensors does not exist", err)

    def test_contradiction_in_a_test(self):
        flags = [*self.run_flags("lora"), "--fine-tune-type", "dora"]
        code, _, err = command("--test", *flags)
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertIn("fine_tune_type is dora but the adapter", err)


class TestFromAdapters(CommandCase):
    """Preference tuning that starts from an adapter of supervised tuning."""

    KEYS = ["self_attn.q_proj", "mlp.up_proj"]

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        root = Path(cls.shared.name)
        texts = [{"text": f"the {w} is here"} for w in "tea hat pen cup".split()]
        save_rows(root / "sft-data", texts, ("train", "valid"))
        cls.sft = {}
        for kind in ("lora", "dora", "full"):
            cls.sft[kind] = root / f"sft-{kind}"
            parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": cls.KEYS}
            config = write_yaml(root / "sft.yaml", lora_parameters=parameters)
            quietly(
                *(lora.main, "mlx_lm.lora", "-c", config, "--train"),
                *("--model", cls.model, "--data", root / "sft-data"),
                *("--fine-tune-type", kind, "--adapter-path", cls.sft[kind]),
                *("--num-layers", 1, "--iters", 5, "--batch-size", 2),
                *("--learning-rate", 1e-2, "--val-batches", 1),
            )

    def flags(self, *more, train=True):
        # The adapter decides the layers.
        flags = super().flags(*more, train=train)
        at = flags.index("--num-layers")
        return flags[:at] + flags[at + 2 :]

    def start(self, kind="lora"):
        return ["--resume-adapter-file", self.sft[kind] / "adapters.safetensors"]

    def test_the_adapter_decides_its_shape(self):
        self.succeed(*self.flags(*self.start()))
        saved = adapter_config(self.adapters)
        self.assertEqual(saved["num_layers"], 1)
        self.assertEqual(saved["lora_parameters"]["rank"], 4)
        self.assertEqual(saved["lora_parameters"]["keys"], self.KEYS)
        ours = mx.load(str(self.adapters / "adapters.safetensors"))
        theirs = mx.load(str(self.sft["lora"] / "adapters.safetensors"))
        self.assertEqual(
            {k: v.shape for k, v in ours.items()},
            {k: v.shape for k, v in theirs.items()},
        )

    def test_reference_is_the_sft_policy(self):
        for kind in ("lora", "dora", "full"):
            with self.subTest(kind=kind):
                sft_flags = ["--model", self.model, "--data", self.data, "--test"]
                sft = watched_command(*sft_flags, "--adapter-path", self.sft[kind])
                more = [*self.start(kind), "--learning-rate", 1e-2, "--test"]
                seen = watched_command(*self.flags(*more))
                first = metrics_of(self.adapters)[0]
                self.assertEqual(first["val_rewards/margins"], 0)
                self.assertEqual(
                    first["val_perplexity/reference"], first["val_perplexity/policy"]
                )
                for metrics, prefix in ((first, "val_"), (seen.metrics, "")):
                    self.assertAlmostEqual(
                        metrics[f"{prefix}perplexity/reference"],
                        sft.metrics["perplexity/policy"],
                        delta=1e-4 * sft.metrics["perplexity/policy"],
                    )
                # The SFT policy is not the model it was made of.
                self.assertNotAlmostEqual(
                    sft.metrics["perplexity/policy"],
                    sft.metrics["perplexity/reference"],
                    places=1,
                )
                np.testing.assert_array_equal(
                    loaded_logits(self.model, self.adapters), logits_of(seen.model)
                )
                again = watched_command(*self.flags("--test", train=False))
                self.assertEqual(again.metrics, seen.metrics)

    def test_a_folder_is_enough(self):
        out = self.succeed(*self.flags("--resume-adapter-file", self.sft["lora"]))
        self.assertIn("Starting from the weights in", out)
        self.assertEqual(metrics_of(self.adapters)[0]["val_rewards/margins"], 0)

    def test_conflicts_are_named(self):
        cases = {
            "num_layers is 2 but": ["--num-layers", 2],
            "fine_tune_type is dora but": ["--fine-tune-type", "dora"],
        }
        for name, value in {"rank": 8, "scale": 20.0, "keys": ["x"]}.items():
            config = self.folder / f"{name}.yaml"
            write_yaml(config, lora_parameters={name: value})
            cases[rf"lora_parameters\.{name} is .* but"] = ["-c", config]
        for pattern, more in cases.items():
            with self.subTest(pattern=pattern):
                self.fail_in_one_line(pattern, *self.flags(*self.start(), *more))

    def test_what_agrees_is_fine_and_dropout_may_change(self):
        parameters = {"rank": 4, "keys": self.KEYS, "dropout": 0.25}
        config = write_yaml(self.folder / "dpo.yaml", lora_parameters=parameters)
        self.succeed(*self.flags(*self.start(), "-c", config, "--num-layers", 1))
        self.assertEqual(
            adapter_config(self.adapters)["lora_parameters"],
            {**parameters, "scale": 10.0},
        )

    def test_a_resumed_run_keeps_its_own_dropout(self):
        config = write_yaml(self.folder / "dpo.yaml", lora_parameters={"dropout": 0.2})
        more = [*self.start(), "-c", config, "--iters", 5, "--learning-rate", 1e-2]
        whole = self.folder / "whole"
        self.succeed(*self.flags(*more, "--adapter-path", whole))
        with signals("_take_step", 2):
            self.assertEqual(command(*self.flags(*more))[0], 143)
        self.succeed("--resume", self.adapters)
        names = ("adapters.safetensors", "adapter_config.json")
        ours, theirs = ([f / name for name in names] for f in (self.adapters, whole))
        self.assertTrue(bits(ours[0]) == bits(theirs[0]))
        saved = [
            adapter_config(path)["lora_parameters"] for path in (ours[1], theirs[1])
        ]
        self.assertEqual(saved[0], saved[1])
        self.assertEqual(saved[0]["dropout"], 0.2)

    def test_tensor_that_does_not_fit(self):
        file = self.folder / "adapters.safetensors"
        weights = mx.load(str(self.sft["lora"] / "adapters.safetensors"))
        name = next(iter(weights))
        cases = {
            "tensor 'model.layers.9.x' is not trained": {
                **weights,
                "model.layers.9.x": mx.zeros((1,)),
            },
            f"tensor '{name}' has shape": {**weights, name: mx.zeros((2, 2))},
            f"has no tensor '{name}'": {k: weights[k] for k in weights if k != name},
        }
        shutil.copy(self.sft["lora"] / "adapter_config.json", self.folder)
        for pattern, tensors in cases.items():
            mx.save_safetensors(str(file), tensors)
            with self.subTest(pattern=pattern):
                self.fail_in_one_line(
                    pattern, *self.flags("--resume-adapter-file", file)
                )
        file.write_bytes(b"nothing")
        more = ["--resume-adapter-file", file]
        self.fail_in_one_line("Can't read the adapter file", *self.flags(*more))
        file.unlink()
        self.fail_in_one_line("does not exist", *self.flags(*more))
        other = self.folder / "adapters.npy"
        mx.save(str(other), mx.zeros((1,)))
        more = ["--resume-adapter-file", other]
        self.fail_in_one_line(
            "Can't read .*npy: it holds one array", *self.flags(*more)
        )

    def test_adapter_without_a_configuration(self):
        file = self.folder / "bare.safetensors"
        shutil.copy(self.sft["lora"] / "adapters.safetensors", file)
        more = ["--resume-adapter-file", file]
        self.fail_in_one_line("has shape", *self.flags(*more))
        self.assertIsNone(adapter_config(file))
        parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": self.KEYS}
        config = write_yaml(self.folder / "dpo.yaml", lora_parameters=parameters)
        out = self.succeed(*self.flags(*more, "-c", config, "--num-layers", 1))
        self.assertIn("bare.safetensors has no adapter_config.json", out)

    def test_start_is_not_overwritten(self):
        folder = self.folder / "sft"
        shutil.copytree(self.sft["lora"], folder)
        before = (folder / "adapters.safetensors").read_bytes()
        more = ["--resume-adapter-file", folder, "--adapter-path", folder]
        self.fail_in_one_line("holds the adapter to start from", *self.flags(*more))
        self.assertEqual((folder / "adapters.safetensors").read_bytes(), before)

    def test_adapter_of_a_preference_run(self):
        self.succeed(*self.flags("--learning-rate", 1e-2, "--test"))
        second = self.folder / "second"
        more = ["--resume-adapter-file", self.adapters, "--adapter-path", second]
        code, _, err = command(*self.flags(*more))
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertRegex(err, "written by a DPO run.*--resume.*new_reference: true")
        self.assertFalse(second.exists())
        self.succeed(*self.flags(*more, "--new-reference"))
        first = metrics_of(second)[0]
        self.assertEqual(first["val_rewards/margins"], 0)
        self.assertAlmostEqual(
            first["val_perplexity/reference"],
            metrics_of(self.adapters)[-1]["val_perplexity/policy"],
            places=2,
        )

    def test_separate_reference_model(self):
        other = save_tiny_model(self.folder / "other", num_hidden_layers=1)
        more = ["--reference-model", other, "--test"]
        seen = watched_command(*self.flags(*self.start(), *more))
        again = watched_command(*self.flags("--test", train=False))
        self.assertEqual(again.metrics, seen.metrics)
        itself = watched_command(
            *("--test", "--model", other, "--data", self.data, "--adapter-path", "")
        )
        self.assertAlmostEqual(
            seen.metrics["perplexity/reference"],
            itself.metrics["perplexity/policy"],
            places=2,
        )
        self.assertIn("reference", seen.out)


class TestPolicy(CommandCase):
    def prepared(self, **settings):
        args = dpo.resolve_args([])
        vars(args).update(settings)
        model = tiny_model()
        make_policy(args, model)
        return model

    def trained_layers(self, model):
        names = [name for name, _ in tree_flatten(model.trainable_parameters())]
        return sorted({int(name.split(".")[2]) for name in names})

    def test_layers(self):
        for kind in ("lora", "dora", "full"):
            for number, layers in {
                1: [2],
                2: [1, 2],
                3: [0, 1, 2],
                -1: [0, 1, 2],
            }.items():
                with self.subTest(kind=kind, number=number):
                    model = self.prepared(fine_tune_type=kind, num_layers=number)
                    self.assertEqual(self.trained_layers(model), layers)

    def test_nothing_to_train(self):
        parameters = {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["nowhere"]}
        with self.assertRaisesRegex(ValueError, r"no layers named \['nowhere'\]"):
            self.prepared(num_layers=1, lora_parameters=parameters)

    def test_dora_of_quantized_layers(self):
        def tried(width, kind, keys=None):
            model = tiny_model(None)
            nn.quantize(model, group_size=32, bits=width)
            lora = {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": keys}
            prepare_policy(model, kind, 2, lora)
            mx.eval(model(mx.array([[1, 2, 3]])))

        for width in (2, 3, 4, 5, 6, 8):
            tried(width, "lora")
            tried(width, "lora", ["model.embed_tokens"])
            refused = self.assertRaisesRegex(InputError, f"quantized to {width} bits")
            with self.subTest(bits=width):
                with refused if 32 % width else contextlib.nullcontext():
                    tried(width, "dora")
                with refused:
                    tried(width, "dora", ["model.embed_tokens"])
        model = save_tiny_model(self.folder / "3-bit", quantize=3)
        more = ["--model", model, "--fine-tune-type", "dora"]
        self.fail_in_one_line("can't adapt model.layers.*3 bits", *self.flags(*more))
        # What upstream refuses itself is one line, too.
        moe = zoo.build("qwen3_moe")
        with self.assertRaisesRegex(InputError, "SwitchLinear doesn't support DoRA"):
            prepare_policy(moe, "dora", 1, {"rank": 4, "scale": 1.0, "dropout": 0.0})

    def test_load_weights(self):
        file = self.folder / "w.safetensors"
        model = self.prepared(num_layers=1)
        weights = dict(tree_flatten(model.trainable_parameters()))
        weights = {k: v + 1 for k, v in weights.items()}
        mx.save_safetensors(str(file), weights)
        load_weights(model, file)
        for name, value in tree_flatten(model.trainable_parameters()):
            self.assertTrue(mx.array_equal(value, weights[name]))

    def test_load_model(self):
        model, tokenizer = load_model(str(self.model))
        self.assertEqual(len(model.layers), 3)
        self.assertEqual(tokenizer.eos_token, "</s>")

    def test_nothing_to_adopt(self):
        args = dpo.resolve_args(["--train"])
        before = dict(vars(args))
        adopt_adapter_config(args)
        self.assertEqual(vars(args), before)


if __name__ == "__main__":
    unittest.main()
