# Copyright © 2026 MLX Contributors

"""Adapter and cache folders that somebody else, or an accident, has filled."""

import contextlib
import io
import json
import os
import shutil
import stat
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from test_dpo_command import TEXT_ROWS, CommandCase, command
from test_folder_lock import content
from tiny import HAS_MATPLOTLIB, save_rows, save_tiny_model

from mlx_lm.preference.data import cache as token_cache
from mlx_lm.preference.reference import cache as reference_cache
from mlx_lm.preference.run.folder import MetricsFile
from mlx_lm.preference.settings.table import CONFIG_DEFAULTS

# A model that brings code along, which leaves a trace where it runs.
CODE = """
from pathlib import Path
from mlx_lm.models.llama import Model, ModelArgs
(Path(__file__).parent / "ran").touch()
"""


class FolderCase(CommandCase):
    def setUp(self):
        super().setUp()
        environment = {"XDG_CACHE_HOME": str(self.folder / "cache")}
        patch = mock.patch.dict(os.environ, environment)
        patch.start()
        self.addCleanup(patch.stop)

    def change(self, **settings):
        file = self.adapters / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    def refused(self, pattern, *argv):
        """Exit code 2, one line, and not a byte of the folder has changed."""
        before = content(self.adapters)
        code, _, err = command(*argv)
        self.assertEqual(code, 2, err)
        self.assertRegex(err, rf"\AError: .*{pattern}.*\n\Z")
        self.assertEqual(content(self.adapters), before)


class TestTrust(FolderCase):
    """What a folder names is said, and no code of it runs."""

    def test_code_runs_for_a_flag_of_this_command_alone(self):
        model = save_tiny_model(self.folder / "theirs")
        (model / "model.py").write_text(CODE)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(
            json.dumps({**config, "model_file": "model.py"})
        )
        self.succeed(*self.flags("--model", model, "--trust-remote-code", "--iters", 1))
        self.assertTrue((model / "ran").exists())
        (model / "ran").unlink()
        hub = {"path": "x/y", "config": {"trust_remote_code": True}}
        self.change(trust_remote_code=True)
        for argv in (["--resume", self.adapters], self.a_test()):
            self.refused("trust.remote.code", *argv)
            self.assertFalse((model / "ran").exists())
        self.succeed("--resume", self.adapters, "--iters", 2, "--trust-remote-code")
        self.assertTrue((model / "ran").exists())
        # Loaders of data have a trust of their own.
        self.change(data=None, hf_dataset=[hub], model=str(self.model))
        with mock.patch("datasets.load_dataset", side_effect=OSError("seen")) as load:
            self.refused("seen", "--resume", self.adapters)
        self.assertEqual(load.call_args, mock.call("x/y"))

    def a_test(self):
        return ["--test", "--adapter-path", self.adapters, "--data", self.data]

    def test_what_leads_out_of_it_is_said(self):
        self.succeed(*self.flags("--iters", 1))
        elsewhere = self.folder / "elsewhere"
        self.change(reference_cache=str(elsewhere), report_to="tensorboard\x1b[2J")
        code, out, err = command("--resume", self.adapters)
        self.assertIn(
            f"Taken from {self.adapters}: data {str(self.data)!r}, model "
            f"{str(self.model)!r}, reference_cache {str(elsewhere)!r}, report_to "
            r"'tensorboard\x1b[2J'.",
            out,
        )
        out = self.succeed("--resume", self.adapters, "--report-to", "")
        self.assertNotIn("report_to", out)


class TestSettings(FolderCase):
    """An adapter_config.json that holds what no run has written."""

    def test_types(self):
        self.succeed(*self.flags("--iters", 1))
        whole = shutil.copytree(self.adapters, self.folder / "whole")
        cases = {
            "beta": "low",
            "seed": 10**20,
            "iters": 10**400,
            "learning_rate": [1],
            "num_layers": 1.5,
            "fine_tune_type": "loraa",
            "lora_parameters": {"rank": [1]},
            "lr_schedule": 5,
            "hf_dataset": [1],
            "optimizer": {},
            "optimizer_config": {"adamm": 1},
            "criteria": 5,
            "loss_type": {"sigmoid": 1},
            "sample_prompts": [1],
            "report_to": [1],
            "data": 5,
            "model": True,
            "resume_adapter_file": "text",
            "explicit": 5,
        }
        accepted = set()
        for key, value in cases.items():
            shutil.rmtree(self.adapters)
            shutil.copytree(whole, self.adapters)
            self.change(**{key: value})
            with self.subTest(key):
                if key not in CONFIG_DEFAULTS:
                    accepted.add(key)
                    self.succeed("--resume", self.adapters)
                    continue
                self.refused(
                    rf"{key}.*|.*{self.adapters}/adapter_config.json: {key} must be ",
                    *("--resume", self.adapters),
                )
        self.assertEqual(accepted, {"explicit"})
        for raw in ("{", "[]", '{"a": ' + "[" * 10**5):
            (self.adapters / "adapter_config.json").write_text(raw)
            self.refused("adapter_config.json is ", "--resume", self.adapters)
        (self.adapters / "adapter_config.json").unlink()
        os.mkfifo(self.adapters / "adapter_config.json")
        self.refused("It is no regular file", "--resume", self.adapters)


class TestRefusedRuns(FolderCase):
    """A run that can't begin leaves an earlier one's folder as it was."""

    def test_nothing_is_touched(self):
        self.succeed(*self.flags("--iters", 1, "--val-batches", 1))
        parts = [{"role": "user", "content": [{"type": "image"}]}]
        prompts = self.folder / "prompts.jsonl"
        prompts.write_text(json.dumps({"messages": parts}))
        asked = self.flags("--sample-prompts", prompts)
        self.refused("sample_prompts, prompt 1: the chat template can't write", *asked)
        self.refused("can't write it", "--resume", self.adapters, *asked[-2:])
        plain = save_tiny_model(self.folder / "plain")
        (plain / "chat_template.jinja").unlink()
        prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
        texts = save_rows(self.folder / "texts", TEXT_ROWS)
        asked += ["--model", plain, "--data", texts]
        self.refused("has messages, which need a chat", *asked)
        # Another rank has no data: this one has not begun yet.
        with mock.patch(
            "mlx_lm.preference.settings.together.start_together",
            side_effect=SystemExit(2),
        ):
            before = content(self.adapters)
            self.assertEqual(command(*self.flags())[0], 2)
            self.assertEqual(content(self.adapters), before)

    def test_links_are_not_followed(self):
        self.succeed(*self.flags("--iters", 1, "--save-best", "loss"))
        whole = shutil.copytree(self.adapters, self.folder / "whole")
        precious = self.folder / "precious"
        precious.mkdir()
        target = precious / "diary"
        target.write_text("dear")
        names = {
            "metrics.jsonl": target,
            ".lock": target,
            "best": precious,
            "samples.jsonl": target,
        }
        prompts = self.folder / "prompts.txt"
        prompts.write_text("Say tea.")
        for name, leads_to in names.items():
            shutil.rmtree(self.adapters)
            shutil.copytree(whole, self.adapters)
            path = self.adapters / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.symlink_to(leads_to)
            more = ["--save-best", "loss", "--sample-prompts", prompts]
            for argv in (self.flags(*more), ["--resume", self.adapters, *more]):
                with self.subTest(name, argv=argv[:1]):
                    self.refused(f"{self.adapters / name}", *argv)
                    self.assertEqual(content(precious), {target: b"dear"})
        # One that is put there later is refused where it is written.
        file = MetricsFile(self.folder / "metrics.jsonl")
        for make in (lambda path: path.symlink_to(target), os.mkfifo):
            file.path.unlink()
            make(file.path)
            with self.assertRaisesRegex(ValueError, "Can't write"):
                file.on_train_loss_report({"loss": 1})
        self.assertEqual(content(precious), {target: b"dear"})


class TestDamagedFiles(FolderCase):
    """What only a report shows is left out with a line, and blocks nothing."""

    LINES = (
        "{}",
        "[1]",
        "half of",
        '{"iteration": "1", "prompt": "a", "answer": "b"}',
        '{"iteration": 1, "prompt": 5, "answer": "b"}',
        '{"iteration": 1, "prompt": "a"}',
    )
    TEXTS = ("{", "[]", "5", '{"after": "x", "pairs": [{"right": true}]}')

    @unittest.skipUnless(HAS_MATPLOTLIB, "needs matplotlib")
    def test_every_file(self):
        prompts = self.folder / "prompts.txt"
        prompts.write_text("Say tea.")
        text = self.folder / "text.txt"
        text.write_text("tea and hat " * 200)
        more = (
            "--sample-prompts",
            prompts,
            "--retain-data",
            text,
            "--test",
            "--report",
        )
        self.succeed(*self.flags("--iters", 1, "--test-batches", 1, *more))
        whole = (self.adapters / "samples.jsonl").read_text()
        for name in ("samples.jsonl", "metrics.jsonl"):
            file = self.adapters / name
            file.write_text("".join(x + "\n" for x in self.LINES) + file.read_text())
        for name in ("test_metrics.json", "test_pairs.json", "retained_text.json"):
            for raw in self.TEXTS:
                with self.subTest(name, raw=raw):
                    file = self.adapters / name
                    before = file.read_text()
                    file.write_text(raw)
                    out = self.shown()
                    self.assertRegex(out, rf"\[WARNING\] .*{name} is damaged")
                    self.assertRegex(out, r"samples.jsonl is damaged: 6 of its lines")
                    file.write_text(before)
        out = self.succeed("--resume", self.adapters, "--iters", 2)
        self.assertIn("samples.jsonl is damaged: 6 of its lines are left out.", out)
        kept = (self.adapters / "samples.jsonl").read_text()
        self.assertTrue(kept.startswith(whole))

    def shown(self):
        from mlx_lm.preference.report.page import write_report

        with contextlib.redirect_stdout(io.StringIO()) as out:
            write_report(self.adapters)
        return out.getvalue()


class TestCaches(FolderCase):
    """A cache that can't be used costs a line and no more."""

    def test_a_lock_that_stays_is_waited_for_once(self):
        waits = []
        transaction = reference_cache._transaction

        @contextlib.contextmanager
        def held(path, start, wait):
            waits.append(wait)
            raise OSError("database is locked")
            yield

        self.assertIsNot(transaction, held)
        with mock.patch.object(reference_cache, "_transaction", held):
            out = self.succeed(*self.flags("--iters", 3, "--save-every", 1))
        self.assertEqual(out.count("database is locked"), 1)
        self.assertEqual([wait for wait in waits if wait], [10])
        self.assertGreater(len(waits), 2)

    def test_files_of_a_shared_folder(self):
        before = os.umask(0o002)
        try:
            self.succeed(*self.flags("--iters", 1))
        finally:
            os.umask(before)
        (file,) = self.folder.rglob("*.sqlite")
        self.assertEqual(stat.S_IMODE(file.stat().st_mode), 0o664)

    @unittest.skipIf(os.name == "nt", "needs permissions")
    def test_a_folder_that_is_closed(self):
        # What is forbidden is forbidden to others than root.
        with tempfile.TemporaryDirectory() as root:
            closed = Path(root) / "closed"
            closed.mkdir()
            cache = token_cache.TokenCache(closed / "tokens", None, {})
            references = closed / "references"
            os.chmod(root, 0o755)
            closed.chmod(0)
            user = os.geteuid()
            if user == 0:
                os.seteuid(65534)
            try:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    self.assertIsNone(cache.load([{"a": 1}]))
                    numbers = reference_cache.ReferenceCache(references, "0" * 64)
                    numbers.store([b"0" * 16], [[-1.0, -2.0]])
                    numbers.save()
                    numbers.save()
            finally:
                os.seteuid(user)
                closed.chmod(0o755)
        self.assertRegex(out.getvalue(), r"\A\[WARNING\] Can't save .*\n\Z")


if __name__ == "__main__":
    unittest.main()
