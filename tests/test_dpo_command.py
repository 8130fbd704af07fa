# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import mlx.core as mx
import yaml
from folders import FolderCase
from mlx.utils import tree_flatten
from test_gpt2 import save_gpt2
from tiny import Recorder, save_rows, save_tiny_model

from mlx_lm import cli, dpo
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.policy.model import load_model
from mlx_lm.preference.policy.reference import load_reference_model
from mlx_lm.preference.report.testing import evaluate_model
from mlx_lm.preference.run.job import Job
from mlx_lm.preference.run.setup import load_data
from mlx_lm.preference.settings.checks import check_args
from mlx_lm.tuner import callbacks

TEXT_ROWS = [
    {"prompt": f"Say {word}: ", "chosen": word, "rejected": f"never {word}"}
    for word in "tea hat pen cup sun ink map oak".split()
]
METRICS = {
    *("iteration", "loss", "train_loss", "learning_rate", "grad_norm", "kl_estimate"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "logps/accuracies"),
    *("logps/accuracies_per_token", "reference_logps/accuracies"),
    *("reference_logps/accuracies_per_token", "perplexity/policy"),
    *("perplexity/reference", "pairs_per_second", "tokens_per_second", "padding"),
    *("trained_pairs", "trained_tokens", "peak_memory"),
}


def command(*argv, module=dpo):
    """Run mlx_lm.dpo, or another command, here: exit code, stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = [module.__name__, *map(str, argv)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", words):
            try:
                module.main()
            except SystemExit as e:
                code = e.code
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    return code, plain, err.getvalue()


def metrics_of(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_yaml(path, **config):
    path = Path(path)
    path.write_text(yaml.safe_dump(config))
    return path


class TestEnvironment(unittest.TestCase):
    name = "MLX_ENABLE_CACHE_THRASHING_CHECK"

    def seen(self, **given):
        """The variable as a run finds it."""
        found = []

        def resolve():
            found.append(os.environ.get(self.name))
            raise InputError("seen")

        with mock.patch.dict(os.environ):
            os.environ.pop(self.name, None)
            os.environ |= given
            with mock.patch.object(dpo, "resolve_args", resolve):
                command()
        return found

    def test_full_cuda_caches_do_not_end_a_run(self):
        self.assertEqual(self.seen(), ["0"])

    def test_a_folder_for_kernels_that_is_not_there(self):
        self.name = "TMPDIR"
        with mock.patch.object(tempfile, "tempdir", None):
            (found,) = self.seen(TMPDIR="/nowhere")
            self.assertTrue(os.path.isdir(found))

    def test_ranks_that_are_not_there(self):
        broken = mock.Mock(side_effect=RuntimeError("[ring] no hosts"))
        with mock.patch.object(mx.distributed, "init", broken):
            code, _, err = command("--train")
        self.assertEqual(code, 2)
        self.assertRegex(err, r"\AError: Can't join .*: \[ring\] no hosts\. .*\n\Z")

    def test_the_users_wish_stands(self):
        self.assertEqual(self.seen(**{self.name: "1"}), ["1"])


class FakeService(ModuleType):
    """Stands in for wandb and swanlab."""

    def __init__(self):
        super().__init__("service")
        self.started, self.logged = [], []

    def init(self, **kwargs):
        self.started.append(kwargs)

    def log(self, data, step):
        self.logged.append((step, data))


class CommandCase(FolderCase):
    @classmethod
    def setUpClass(cls):
        cls.shared = tempfile.TemporaryDirectory()
        root = Path(cls.shared.name)
        cls.model = save_tiny_model(root / "model", max_position_embeddings=2048)
        cls.data = save_rows(root / "data")

    @classmethod
    def tearDownClass(cls):
        cls.shared.cleanup()

    def setUp(self):
        super().setUp()
        self.adapters = self.folder / "adapters"

    def flags(self, *more, train=True):
        return [
            *("--model", self.model, "--data", self.data),
            *("--adapter-path", self.adapters, "--num-layers", 2),
            *("--max-seq-length", 64, "--iters", 3, "--batch-size", 4),
            *(["--train"] if train else []),
            *more,
        ]

    def succeed(self, *argv):
        code, out, err = command(*argv)
        self.assertEqual(code, 0, err)
        return out

    def fail_in_one_line(self, pattern, *argv):
        code, _, err = command(*argv)
        self.assertEqual(code, 2)
        self.assertRegex(err, rf"\AError: .*{pattern}.*\n\Z")
        self.assertFalse(self.adapters.exists(), list(self.adapters.rglob("*")))
        return err


class TestEveryKindGoesOn(CommandCase):
    """``--resume DIR`` alone goes on with a run of any kind."""

    KINDS = {
        "lora": (),
        "dora": ("--fine-tune-type", "dora"),
        "full": ("--fine-tune-type", "full"),
        "head": ("--fine-tune-type", "full", "--train-head"),
        "moving": ("--sync-reference", "--sync-steps", 1, "--steps-per-eval", 2),
        "packed": ("--pack",),
        "accumulated": ("--grad-accumulation-steps", 2),
    }

    def test_each_kind(self):
        for kind, flags in self.KINDS.items():
            with self.subTest(kind=kind):
                whole, parts = self.folder / f"{kind} whole", self.folder / kind
                given = [*self.flags("--no-reference-cache", *flags), "--save-every", 1]
                self.succeed(*given, "--iters", 4, "--adapter-path", whole)
                self.succeed(*given, "--iters", 2, "--adapter-path", parts)
                self.succeed("--resume", parts, "--iters", 4)
                one, two = (
                    folder / "adapters.safetensors" for folder in (whole, parts)
                )
                self.assertEqual(one.read_bytes(), two.read_bytes())


class TestIssueConfigurations(CommandCase):
    """The two configurations that must run, with tiny local models."""

    def test_gpt2_lora(self):
        model = save_gpt2(self.folder / "gpt2", n_layer=12, n_positions=1024)
        data = save_rows(self.folder / "text", TEXT_ROWS, ("train", "valid"))
        config = self.folder / "dpo.yaml"
        config.write_text(
            f'model: "{model}"\n'
            "train: true\n"
            'fine_tune_type: "lora"\n'
            f'data: "{data}"\n'
            "beta: 0.1\n"
            "batch_size: 4\n"
            "iters: 1000\n"
            "learning_rate: 1e-6\n"
            "max_seq_length: 1024\n"
            "lora_parameters: {rank: 8, dropout: 0.0, scale: 20.0}\n"
            "reference_model: null\n"
        )
        out = self.succeed("-c", config, "--iters", 4, "--adapter-path", self.adapters)
        saved = json.loads((self.adapters / "adapter_config.json").read_text())
        self.assertEqual(saved["num_layers"], 12)
        self.assertEqual(saved["learning_rate"], 1e-6)
        self.assertEqual(saved["iters"], 4)
        self.assertIsNone(saved["reference_model"])
        weights = mx.load(str(self.adapters / "adapters.safetensors"))
        layers = {re.search(r"h\.(\d+)\.", k)[1] for k in weights}
        self.assertEqual(layers, {str(i) for i in range(12)})
        # What is shown is the tail of what is trained on: raw text, no template.
        self.assertRegex(out, r"rows are +text · text")
        self.assertEqual(metrics_of(self.adapters)[0]["val_rewards/margins"], 0)

    def test_llama_dora_with_reference_model(self):
        model = save_tiny_model(self.folder / "llama", max_position_embeddings=4096)
        other = save_tiny_model(
            self.folder / "other", num_hidden_layers=1, max_position_embeddings=4096
        )
        config = self.folder / "dpo.yaml"
        config.write_text(
            f'model: "{model}"\n'
            "train: true\n"
            'fine_tune_type: "dora"\n'
            f'data: "{self.data}"\n'
            "beta: 0.2\n"
            "batch_size: 8\n"
            "iters: 5000\n"
            "learning_rate: 5e-7\n"
            "max_seq_length: 2048\n"
            "lora_parameters: {rank: 16, dropout: 0.1, scale: 10.0}\n"
            f'reference_model: "{other}"\n'
            "grad_checkpoint: true\n"
            'optimizer: "adamw"\n'
            'lr_schedule: {name: "cosine", warmup_steps: 100}\n'
            'report_to: "wandb"\n'
            'project_name: "dpo-llama-experiments"\n'
        )
        wandb = FakeService()
        with mock.patch.object(callbacks, "wandb", wandb):
            out = self.succeed(
                *("--config", config, "--iters", 4, "--adapter-path", self.adapters)
            )
        self.assertRegex(" ".join(out.split()), "warmup_steps 100 is longer .* 3 of 4")
        (started,) = wandb.started
        self.assertEqual(started["project"], "dpo-llama-experiments")
        self.assertEqual(started["config"]["fine_tune_type"], "dora")
        self.assertEqual(started["config"]["iters"], 4)
        self.assertEqual([step for step, _ in wandb.logged], [0, 4, 4])
        # The rate peaks at the last update, where the rise ends.
        self.assertAlmostEqual(wandb.logged[1][1]["learning_rate"], 5e-7, delta=1e-12)
        # Another reference than the start: margins differ before the first step.
        self.assertNotEqual(wandb.logged[0][1]["val_rewards/margins"], 0)


class TestReports(CommandCase):
    def test_callbacks_and_metrics_file(self):
        services = {"wandb": FakeService(), "swanlab": FakeService()}
        recorder = Recorder()
        flags = self.flags(
            *("--report-to", "wandb,swanlab", "--steps-per-report", 2),
            *("--steps-per-eval", 2, "--save-every", 2),
        )
        args = dpo.resolve_args([str(flag) for flag in flags])
        with mock.patch.multiple(callbacks, **services):
            with contextlib.redirect_stdout(io.StringIO()):
                dpo.run(args, training_callback=recorder)
        steps = [0, 2, 2, 3, 3]
        for service in services.values():
            self.assertEqual([step for step, _ in service.logged], steps)
        lines = metrics_of(self.adapters)
        self.assertEqual([line["iteration"] for line in lines], steps)
        self.assertEqual(
            lines, [recorder.val[0], *sum(zip(recorder.train, recorder.val[1:]), ())]
        )
        self.assertEqual(lines, [data for _, data in services["wandb"].logged])
        self.assertLessEqual(METRICS, set(lines[1]))
        in_validation = {k for k in METRICS if "/" in k} | {"loss", "kl_estimate"}
        self.assertEqual(
            set(lines[0]),
            {f"val_{k}" for k in in_validation}
            | {"iteration", "val_time", "val_pairs"},
        )
        self.assertEqual(lines[0]["val_rewards/accuracies"], 0)
        self.assertAlmostEqual(lines[0]["val_loss"], 0.693147, places=5)
        self.assertEqual(lines[-2]["trained_pairs"], 12 - 1)
        files = {file.name for file in self.adapters.iterdir()}
        self.assertEqual(
            files,
            {
                "adapters.safetensors",
                "0000002_adapters.safetensors",
                "0000002_state.safetensors",
                "0000003_adapters.safetensors",
                "0000003_state.safetensors",
                "adapter_config.json",
                "metrics.jsonl",
            },
        )

    def test_caller_needs_no_parser(self):
        recorder = Recorder()
        args = SimpleNamespace(
            **{**dpo.CONFIG_DEFAULTS, "model": str(self.model), "train": True},
        )
        args.data, args.adapter_path = str(self.data), str(self.adapters)
        args.iters = 1
        with contextlib.redirect_stdout(io.StringIO()):
            # num_layers is 16 by default, the model has 3.
            dpo.run(args, recorder)
        self.assertEqual([info["iteration"] for info in recorder.train], [1])
        self.assertEqual([info["iteration"] for info in recorder.val], [0, 1])

    def test_parts_of_a_run(self):
        args = dpo.resolve_args([str(flag) for flag in self.flags("--test")])
        check_args(args)
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            model, tokenizer = load_model(args.model, args.trust_remote_code)
            train, valid, test = load_data(args, tokenizer)
            job = Job(args, model, tokenizer, train, valid)
            dpo.train_model(job)
            remembered = job.reference
            metrics = evaluate_model(args, model, test, remembered.model)
        self.assertIsInstance(remembered.model, FrozenStart)
        self.assertEqual(remembered.unknown(train, valid), 0)
        # Validation and test set hold the same rows; the test has the exact KL.
        last = metrics_of(self.adapters)[-1]
        self.assertGreaterEqual(metrics.pop("kl"), 0)
        # What only a test reports is in tests/test_pair_metrics.py.
        metrics = {k: v for k, v in metrics.items() if f"val_{k}" in last}
        others = {"iteration", "val_time", "val_kl_estimate"}
        self.assertEqual({f"val_{k}" for k in metrics}, set(last) - others)
        for k, v in metrics.items():
            self.assertAlmostEqual(
                v, last[f"val_{k}"], delta=1e-5 * max(1, abs(v)), msg=k
            )
        args.batch_size = 12
        with self.assertRaisesRegex(ValueError, "fewer than batch_size=12"):
            dpo.train_model(Job(args, model, tokenizer, train, valid))

    def test_loading_the_reference_model(self):
        args = dpo.resolve_args(["--reference-model", str(self.model)])
        with contextlib.redirect_stdout(io.StringIO()):
            model = load_reference_model(args.reference_model)
        self.assertFalse(model.training)
        self.assertEqual(tree_flatten(model.trainable_parameters()), [])

    def test_epochs_take_the_place_of_iters(self):
        self.succeed(*self.flags("--epochs", 2, "--grad-accumulation-steps", 2))
        lines = metrics_of(self.adapters)
        # 11 pairs make 3 batches.
        self.assertEqual(lines[-1]["iteration"], 6)
        self.assertEqual(lines[-2]["trained_pairs"], 22)

    def test_mask_prompt_is_noticed(self):
        out = self.succeed(*self.flags("--mask-prompt"))
        self.assertIn("mask_prompt has no effect", out)

    def test_length_is_clamped_to_the_positions(self):
        model = save_tiny_model(self.folder / "short", max_position_embeddings=96)
        args = self.flags("--model", model)
        at = args.index("--max-seq-length")
        out = self.succeed(*args[:at], *args[at + 2 :])
        self.assertEqual(out.count("max_seq_length is 96"), 1)
        saved = json.loads((self.adapters / "adapter_config.json").read_text())
        self.assertEqual(saved["max_seq_length"], 96)

    def test_run_without_validation_set(self):
        save_rows(self.folder / "one", names=("train",))
        config = write_yaml(self.folder / "dpo.yaml", valid_fraction=0)
        self.succeed(*self.flags("-c", config, "--data", self.folder / "one"))
        self.assertEqual([m["iteration"] for m in metrics_of(self.adapters)], [3])


class TestRefusals(CommandCase):
    """All others are in bad_inputs.py and bad_models.py."""

    def test_service_that_is_not_installed(self):
        with mock.patch.object(callbacks, "wandb", None):
            code, _, err = command(*self.flags("--report-to", "wandb"))
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertIn("report_to needs wandb: pip install wandb", err)
        # Found before anything is loaded or written.
        self.assertFalse(self.adapters.exists())

    def test_debugging_shows_the_error(self):
        with mock.patch.dict(os.environ, MLX_LM_DEBUG="1"):
            with self.assertRaisesRegex(ValueError, "beta"):
                command(*self.flags("--beta", 0))


class TestWaysIn(unittest.TestCase):
    def test_module_lists_the_flags(self):
        help_text = subprocess.run(
            [sys.executable, "-m", "mlx_lm", "dpo", "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for action in dpo.build_parser()._actions:
            for flag in action.option_strings:
                self.assertIn(flag, help_text)

    def test_command_is_installed(self):
        from importlib.metadata import distribution

        scripts = {s.name: s for s in distribution("mlx-lm").entry_points}
        self.assertIs(scripts["mlx_lm.dpo"].load(), dpo.main)

    def test_subcommand(self):
        out = io.StringIO()
        with mock.patch.object(sys, "argv", ["mlx_lm", "dpo", "--help"]):
            with contextlib.redirect_stdout(out), self.assertRaises(SystemExit) as e:
                cli.main()
        self.assertEqual(e.exception.code, 0)
        self.assertIn("--reference-model", out.getvalue())


if __name__ == "__main__":
    unittest.main()
