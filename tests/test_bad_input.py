# Copyright © 2026 MLX Contributors

"""Unusable input, given to the command: one line, exit code 2, nothing written."""

import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
from bad_inputs import DATA, GOOD, SETTINGS, Desk, good_with, lines
from bad_models import MODELS
from folders import FolderCase
from test_dpo_command import command
from tiny import save_tiny_model

from mlx_lm.lora import yaml_loader
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.files import check_writable, writing
from mlx_lm.preference.policy.model import explain_failure
from mlx_lm.preference.run.checkpoint import newest_state
from mlx_lm.preference.settings.checks import check_types
from mlx_lm.preference.settings.parser import read_config


class CommandCase(FolderCase):
    @classmethod
    def setUpClass(cls):
        shared = tempfile.TemporaryDirectory()
        cls.addClassCleanup(shared.cleanup)
        Desk.model = save_tiny_model(
            Path(shared.name) / "model", max_position_embeddings=2048
        )

    def check(self, desk, result, pattern):
        """One line that says it, and no trace of the run."""
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertRegex(result.stderr, r"\AError: [^\n]*\n\Z")
        pattern = pattern.replace("{folder}", re.escape(str(desk.folder)))
        self.assertRegex(result.stderr, pattern)
        self.assertFalse(desk.adapters.exists())
        self.assertFalse(desk.cache.exists())

    def mount(self, *options):
        """A file system of its own for the adapter, where that is allowed."""
        place = tempfile.mkdtemp(dir=self.folder)
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", place]
        try:
            if subprocess.run(command, capture_output=True).returncode:
                return None
        except OSError:
            return None
        # Weights that are read when they are needed keep their files open.
        self.addCleanup(subprocess.run, ["umount", "--lazy", place], check=True)
        return Path(place)


class TestBadInput(CommandCase):
    def check_table(self, table):
        for number, (name, (fault, pattern)) in enumerate(table.items()):
            desk = Desk(self.folder / str(number))
            with self.subTest(name):
                self.check(desk, desk.run(*desk.given(fault)), pattern)

    def test_data(self):
        self.check_table(DATA)

    def test_settings(self):
        # What is to blame is shorter than a name for it.
        self.check_table({p: (fault, p) for p, fault in SETTINGS.items()})

    def test_models(self):
        self.check_table(MODELS)

    def test_a_process_of_its_own(self):
        desk = Desk(self.folder / "desk")
        words = [sys.executable, "-m", "mlx_lm", "dpo", *desk.flags("--beta", 0)]
        environment = os.environ | {"XDG_CACHE_HOME": str(desk.cache)}
        environment.pop("MLX_LM_DEBUG", None)
        result = subprocess.run(
            words,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=environment,
            timeout=600,
        )
        self.check(desk, result, "beta must be above 0, got 0")

    def test_nothing_to_do_and_nothing_to_do_it_with(self):
        desk = Desk(self.folder / "desk")
        for pattern, argv in (
            ("No data", ["--train", "--adapter-path", desk.adapters]),
            ("--train or --test", ["--model", desk.model, "--data", desk.data]),
        ):
            code, _, err = command(*argv)
            self.check(desk, SimpleNamespace(returncode=code, stderr=err), pattern)

    def test_folder_without_permission(self):
        desk = Desk(self.folder / "desk")
        locked = self.mount("ro")
        if locked is None:
            if os.geteuid() == 0:
                self.skipTest("nothing is forbidden to root")
            locked = desk.folder / "locked"
            locked.mkdir(0o500)
        result = desk.run("--adapter-path", locked / "a/b")
        self.check(
            desk, result, "adapter_path .*a/b can't be written: .* is read-only or"
        )

    def test_single_bad_rows_are_counted(self):
        desk = Desk(self.folder / "desk")
        faults = {
            "unreadable JSON": b'{"prompt',
            "invalid UTF-8": b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}',
            "not a JSON object": b"7",
            "missing column": {"prompt": "a", "rejected": "b"},
            "wrong type": good_with(chosen=[1]),
            "value is None": good_with(chosen=None),
            "empty answer": good_with(chosen=""),
            "equal answers": good_with(chosen="x", rejected="x"),
            "prompt fills max_length": good_with(prompt="say " * 99),
        }
        fine = good_with(prompt="")
        data = desk.train(lines(*GOOD * 11, fine, *faults.values()))
        config = desk.config("learning_rate: 1e-6\nvalid_fraction: 0.0")
        result = desk.run(*data, *config, "--dry-run")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        said = " ".join(result.stdout.split())
        self.assertIn("89 pairs of 98 rows", said)
        for line, reason in enumerate(faults, 90):
            self.assertIn(f"1 row: {reason} (first: train.jsonl:{line}", said)
        self.assertIn("lr 1.0e-06", said)


class TestFullDisk(CommandCase):
    def test_the_last_checkpoint_stays(self):
        desk = Desk(self.folder / "desk")
        # Room for the files of one checkpoint and a half.
        full = self.mount("size=250k")
        if full is None:
            self.skipTest("mounting is not allowed here")
        adapters = full / "adapters"
        result = desk.run("--adapter-path", adapters, "--save-every", 1)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertRegex(
            result.stderr,
            rf"\AError: Can't write {adapters}/.*: .* If the disk is full, make room; "
            r"then the same command goes on, and a run with --resume\.\n\Z",
        )
        state = newest_state(adapters)
        self.assertEqual(state.iteration, 1)
        whole, last = mx.load(str(state.adapter)), mx.load(
            f"{adapters}/adapters.safetensors"
        )
        self.assertEqual(whole.keys(), last.keys())
        self.assertEqual([p for p in adapters.iterdir() if ".tmp" in p.name], [])

    def test_no_room_at_all(self):
        desk = Desk(self.folder / "desk")
        for size, name in (("8k", "metrics.jsonl"), ("20k", ".*_adapters.safetensors")):
            with self.subTest(size):
                full = self.mount(f"size={size}")
                if full is None:
                    self.skipTest("mounting is not allowed here")
                result = desk.run("--adapter-path", full / "adapters")
                self.assertEqual(result.returncode, 2, result.stderr)
                self.assertRegex(
                    result.stderr,
                    rf"\AError: Can't write {full}/adapters/{name}: .*\n\Z",
                )


class TestParts(unittest.TestCase):
    def test_odd_configurations(self):
        cases = {
            b"beta: [" + b"[" * 20_000: "recursion|nested",
            b"seed: 2001-99-99": "month must be",
            b"beta: !odd 1": "dpo.yaml:1:7: .*!odd",
            b"data: \x00": "dpo.yaml: unacceptable character",
            b"data: a\nbeta: \xe4": "dpo.yaml:2: invalid UTF-8",
            b"{a: b}: c": "dpo.yaml:1:1: ",
            b"- beta": "must hold keys and values",
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dpo.yaml"
            for content, pattern in cases.items():
                path.write_bytes(content)
                with self.subTest(content[:20]):
                    with self.assertRaisesRegex(ValueError, pattern):
                        read_config(path, yaml_loader)
            path.write_bytes(b"")
            self.assertEqual(read_config(path, yaml_loader), {})

    def test_what_is_wrong_with_a_model(self):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text("{}")
            (Path(folder) / "tokenizer.json").write_text("{}")
            explain = lambda error: explain_failure(folder, error)
            self.assertEqual(explain(TypeError("no width")), "no width")
            self.assertEqual(explain(KeyError("width")), "KeyError: 'width'")
        self.assertEqual(explain(OSError("offline")), "offline")

    def test_numbers_in_quotes(self):
        for value, hint in (("1e-6", ": in YAML without quotes"), ("low", "")):
            with self.assertRaisesRegex(ValueError, f"a number, got '{value}'{hint}.$"):
                check_types({"learning_rate": value})

    def test_writable(self):
        with tempfile.TemporaryDirectory() as folder:
            check_writable(f"{folder}/a/b/c", "adapter_path")
            self.assertEqual(os.listdir(folder), [])
            (Path(folder) / "link").symlink_to("nowhere")
            with self.assertRaisesRegex(ValueError, "link is no folder"):
                check_writable(f"{folder}/link", "adapter_path")

    def test_writing_names_the_file(self):
        with self.assertRaisesRegex(
            InputError, "Can't write a.bin: .write. Unable. If"
        ):
            with writing("a.bin"):
                raise RuntimeError("[write] Unable.")
        with self.assertRaisesRegex(KeyError, "other"):
            with writing("a.bin"):
                raise KeyError("other")


if __name__ == "__main__":
    unittest.main()
