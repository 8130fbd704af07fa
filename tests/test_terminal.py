# Copyright © 2026 MLX Contributors

"""What is printed stays plain, and never ends a run."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from test_dpo_command import CommandCase, command, metrics_of
from tiny import ROWS, save_rows

from mlx_lm import dpo
from mlx_lm.preference.report import page
from mlx_lm.preference.report.table import short_names
from mlx_lm.preference.run.screen import print_header
from mlx_lm.preference.terminal import lasting_output, visible

# What a name on a disk may hold: rich's markup and emoji, a colour, another direction.
ODD = "a[/y] [b]\\[red] :cat: \x1b[31m\u202egpj.\u2066 \x07\x9b2J é日"
SHOWN = "a[/y] [b]\\[red] :cat: \\x1b[31m\\u202egpj.\\u2066 \\x07\\x9b2J é日"


class Broken(io.StringIO):
    """A stream whose reader is gone, is full, or is closed."""

    encoding = "ascii"

    def __init__(self, error, after=0):
        super().__init__()
        self.error, self.left = error, after

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)

    def flush(self):
        if self.left < 0:
            raise self.error


class TestPlainText(unittest.TestCase):
    def test_visible(self):
        self.assertEqual(visible(ODD), SHOWN)
        self.assertEqual(visible("two\nlines\t"), "two\nlines\\t")
        # Joiners are letters' own.
        self.assertEqual(visible("👩\u200d🚀"), "👩\u200d🚀")
        self.assertEqual(visible("\udcff\r"), "\\udcff\\r")

    def test_panel_and_table(self):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), mock.patch.dict(os.environ, COLUMNS="99"):
            print_header("mlx_lm.dpo", [("model", ODD), ("type", "lora")])
        self.assertIn(SHOWN, out.getvalue())
        self.assertEqual(short_names(["x/\x1b[1m"]), ["\\x1b[1m"])


class TestReport(unittest.TestCase):
    def test_nothing_is_obeyed(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            settings = {"model": ODD, "data": ODD, "loss_type": "sigmoid", "beta": 0.1}
            (folder / "adapter_config.json").write_text(json.dumps(settings))
            lines = {"iteration": 0, "prompt": ODD, "answer": f"{ODD}\n<script>"}
            (folder / "samples.jsonl").write_text(json.dumps(lines))
            html = page.render(folder, ODD, settings, [], [])
        self.assertIn(SHOWN, html)
        self.assertNotRegex(
            html, "[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
        )
        self.assertNotIn("<script>", html)


class TestNobodyReads(CommandCase):
    def check(self, out, err=None):
        """The run takes all its steps, whatever happens to what it prints."""
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err or io.StringIO()),
            mock.patch.object(sys, "argv", ["mlx_lm.dpo", *map(str, self.flags())]),
        ):
            dpo.main()
        self.assertEqual(metrics_of(self.adapters)[-1]["iteration"], 3)

    def test_a_reader_that_goes_away(self):
        for error in (BrokenPipeError(32, "head"), OSError(5, "hung up")):
            for after in (0, 12):
                with self.subTest(error=error, after=after):
                    out = Broken(error, after)
                    self.check(out, Broken(error))

    def test_a_terminal_of_few_letters(self):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        self.check(out)
        out.flush()
        self.assertIn(b"batch \\xb7 iters", out.buffer.getvalue())

    def test_a_process_of_its_own(self):
        script = (
            "import os, sys\n"
            "from mlx_lm.preference.terminal import lasting_output\n"
            "os.close(0)\n"
            "with lasting_output():\n"
            "    assert os.open(os.devnull, os.O_RDONLY) > 2\n"
            "    os.close(0)\n"
            "    for i in range(9): print('x' * 99999, flush=True)\n"
            "    print('left over', end='')\n"
            "    print('went on', file=sys.stderr)\n"
        )
        reading, writing = os.pipe()
        with subprocess.Popen(
            [sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE
        ) as process:
            os.close(writing)
            os.read(reading, 1)
            os.close(reading)
            self.assertEqual(process.stderr.read(), b"went on\n")
        self.assertEqual(process.returncode, 0)

    def test_streams_are_put_back(self):
        before = sys.stdout, sys.stderr
        with mock.patch.object(sys, "stderr", None), lasting_output():
            inner = sys.stdout
            with lasting_output():
                self.assertIs(sys.stdout, inner)
            print("shown", file=io.StringIO())
        self.assertEqual((sys.stdout, sys.stderr), before)

    def test_odd_names(self):
        """A folder and data whose names are markup, escapes and emoji."""
        name = ODD.replace("/", "").replace("\x07", "")
        data = save_rows(self.folder / name, ROWS)
        adapters = self.folder / "[" / "z] [b]"
        flags = self.flags("--adapter-path", adapters, "--data", data)
        code, out, err = command(*flags)
        self.assertEqual((code, err), (0, ""))
        self.assertIn(f"Saved the adapter to {adapters}", out)
        self.assertNotRegex(out, "[\x1b\u202e]")
        code, out, err = command("--resume", adapters)
        self.assertEqual((code, err), (0, ""))
        code, out, err = command(*self.flags("--data", "./\x1b[31m"))
        self.assertEqual((code, err), (2, "Error: Found no data at \\x1b[31m.\n"))


if __name__ == "__main__":
    unittest.main()
