# Copyright © 2026 MLX Contributors

"""Adapters of PEFT as a start, and ours for PEFT, against logits that PEFT gave."""

import contextlib
import io
import json
import shutil
import unittest
from pathlib import Path

import mlx.core as mx
import numpy as np
from folders import FolderCase
from make_peft_fixture import (
    FOLDER,
    MODEL,
    OURS,
    THEIRS,
    TOKENS,
    draw,
    tensors_digest,
    write_ours,
)
from mlx.utils import tree_flatten
from test_dpo_command import CommandCase, metrics_of
from tiny import save_tiny_model

from mlx_lm import load
from mlx_lm.models import llama
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.policy.adapter import adapter_config, adapter_file
from mlx_lm.preference.policy.model import prepare_policy
from mlx_lm.preference.policy.peft import own_shape, save_peft
from mlx_lm.preference.policy.start import load_weights

FIXTURE = json.loads((FOLDER / "logits.json").read_text("utf-8"))
# As wide and deep, with a tokenizer's words.
SHAPE = {k: v for k, v in MODEL.items() if k != "vocab_size"}
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")


def base(**config):
    model = llama.Model(llama.ModelArgs.from_dict({**MODEL, **config}))
    shapes = {k: w.shape for k, w in tree_flatten(model.parameters())}
    model.load_weights([(k, mx.array(w)) for k, w in draw(shapes, 0).items()])
    return model


def started(folder, model=None):
    """A policy that starts from an adapter's folder, as the command makes it."""
    model = model or base()
    path = adapter_file(folder)
    shape = own_shape(path, adapter_config(path))
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_policy(model, **shape)
        load_weights(model, path)
    return model.eval(), shape


def logits(model):
    return np.array(model(mx.array(TOKENS))[0])


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


class TestLogitsOfPeft(FolderCase):
    def test_a_start_gives_the_logits_of_peft(self):
        plain = np.array(FIXTURE["base"])
        close(logits(base()), plain)
        for name in THEIRS:
            with self.subTest(name=name):
                theirs = np.array(FIXTURE["theirs"][name])
                close(logits(started(FOLDER / name)[0]), theirs)
                self.assertGreater(np.abs(theirs - plain).max(), 0.1)

    def test_peft_gives_our_logits(self):
        for name in OURS:
            with self.subTest(name=name):
                ours, theirs = self.folder / name, self.folder / f"{name} peft"
                model = write_ours(ours, name)
                save_peft(ours, theirs)
                known = FIXTURE["ours"][name]
                close(logits(model.eval()), np.array(known["logits"]))
                tensors = mx.load(str(theirs / PEFT_FILES[0]))
                tensors = {k: np.array(w) for k, w in tensors.items()}
                self.assertEqual(tensors_digest(tensors), known["tensors"])
                self.assertEqual(adapter_config(theirs), known["config"])

    def test_there_and_back(self):
        for name in THEIRS:
            with self.subTest(name=name):
                model, shape = started(FOLDER / name)
                trained = dict(tree_flatten(model.trainable_parameters()))
                ours, theirs = self.folder / name, self.folder / f"{name} again"
                ours.mkdir()
                mx.save_safetensors(str(ours / "adapters.safetensors"), trained)
                (ours / "adapter_config.json").write_text(json.dumps(shape))
                save_peft(ours, theirs)
                before, after = (
                    mx.load(str(folder / PEFT_FILES[0]))
                    for folder in (FOLDER / name, theirs)
                )
                self.assertEqual(before.keys(), after.keys())
                for key, w in before.items():
                    self.assertEqual(w.dtype, after[key].dtype)
                    self.assertEqual(bytes(np.array(w)), bytes(np.array(after[key])))
                close(logits(started(theirs)[0]), FIXTURE["theirs"][name])

    def test_layers_of_another_place(self):
        # transformers and mlx-lm name the way to the layers apart in some families.
        file = FOLDER / "lora" / PEFT_FILES[0]
        moved = {
            k.replace("model.layers", "text.layers"): w
            for k, w in mx.load(str(file)).items()
        }
        shutil.copytree(FOLDER / "lora", self.folder, dirs_exist_ok=True)
        mx.save_safetensors(str(self.folder / PEFT_FILES[0]), moved)
        close(logits(started(self.folder)[0]), FIXTURE["theirs"]["lora"])
        mx.save_safetensors(
            str(self.folder / PEFT_FILES[0]), moved | mx.load(str(file))
        )
        with self.assertRaisesRegex(InputError, "Two tensors of the adapter"):
            started(self.folder)


class TestPeftFaults(CommandCase):
    """What can't be taken over, or written, is refused in one line."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = save_tiny_model(Path(cls.shared.name) / "other", **SHAPE)

    def start(self, name="lora", tensors=None, **config):
        folder = self.folder / "peft"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(FOLDER / name, folder)
        if tensors is not None:
            mx.save_safetensors(str(folder / PEFT_FILES[0]), tensors)
        file = folder / PEFT_FILES[1]
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    def refused(self, pattern, folder):
        flags = self.flags("--resume-adapter-file", folder)
        at = flags.index("--num-layers")
        with self.subTest(pattern=pattern):
            self.fail_in_one_line(pattern, *flags[:at], *flags[at + 2 :])

    def test_other_configurations(self):
        cases = {
            "'LOHA'. Merge": {"peft_type": "LOHA"},
            r"rank_pattern \{'q_proj': 2\}": {"rank_pattern": {"q_proj": 2}},
            "alpha_pattern": {"alpha_pattern": {"q_proj": 2}},
            "modules_to_save": {"modules_to_save": ["lm_head"]},
            "bias 'lora_only'": {"bias": "lora_only"},
            "init_lora_weights 'pissa'": {"init_lora_weights": "pissa"},
            "something_new": {"something_new": True},
            "r is 0": {"r": 0},
            "lora_alpha is 'x'": {"lora_alpha": "x"},
        }
        for pattern, config in cases.items():
            self.refused(pattern, self.start(**config))

    def test_other_tensors(self):
        known = mx.load(str(FOLDER / "lora" / PEFT_FILES[0]))
        first = next(iter(sorted(known)))
        less = {k: w for k, w in known.items() if k != first}
        odd = {"base_model.model.lm_head.base_layer.weight": mx.zeros((2, 2))}
        missing = first.removeprefix("base_model.model.").replace("A.weight", "a")
        wide = {k: mx.zeros((w.shape[0], 99)) for k, w in known.items()}
        cases = {
            rf"no tensor '{missing}'.*Is it an adapter of this model\?": less,
            "tensor .*base_layer.weight' is no part of a LoRA": known | odd,
            "has shape": wide,
        }
        for pattern, tensors in cases.items():
            self.refused(pattern, self.start(tensors=tensors))
        self.refused("has shape", self.start(r=5))
        deeper = {k.replace("layers.2", "layers.7"): w for k, w in known.items()}
        self.refused("is not trained here", self.start(tensors=deeper))

    def test_pickles_and_missing_files(self):
        folder = self.start()
        (folder / PEFT_FILES[1]).unlink()
        self.refused("has no adapter_config.json beside it", folder)
        folder = self.start()
        (folder / PEFT_FILES[0]).rename(folder / "adapter_model.bin")
        for path in (folder, folder / "adapter_model.bin"):
            self.refused("is a pickle, which may run code", path)

    def test_what_peft_has_no_place_for(self):
        ours = self.folder / "ours"
        write_ours(ours, "lora")
        config, file = json.loads((ours / PEFT_FILES[1]).read_text()), PEFT_FILES[1]
        tensors = mx.load(str(ours / "adapters.safetensors"))
        mx.eval(tensors)
        whole = {"lm_head.weight": mx.zeros((2, 2))}
        routers = {
            k.replace("q_proj", "gate"): w for k, w in tensors.items() if "q_proj" in k
        }
        experts = {k: w[None] for k, w in tensors.items()}
        for wrong in (whole, routers, experts):
            mx.save_safetensors(str(ours / "adapters.safetensors"), wrong)
            with self.assertRaisesRegex(InputError, "can't be written for PEFT"):
                save_peft(ours, self.folder / "out")
        (ours / file).write_text(json.dumps(config | {"fine_tune_type": "full"}))
        with self.assertRaisesRegex(InputError, "PEFT has adapters only"):
            save_peft(ours, self.folder / "out")
        (ours / file).unlink()
        with self.assertRaisesRegex(InputError, "name an adapter's folder"):
            save_peft(ours, self.folder / "out")
        with self.assertRaisesRegex(InputError, "holds the adapter itself"):
            save_peft(ours, ours)
        self.assertFalse((self.folder / "out").exists())
        flags = self.flags("--peft", "--fine-tune-type", "full")
        self.fail_in_one_line("peft writes a LoRA or DoRA", *flags)


class TestPeftCommand(CommandCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = save_tiny_model(Path(cls.shared.name) / "other", **SHAPE)

    def test_from_peft_to_peft(self):
        flags = self.flags("--resume-adapter-file", FOLDER / "dora")
        at = flags.index("--num-layers")
        flags = [*flags[:at], *flags[at + 2 :], "--peft", "--learning-rate", 1e-2]
        out = self.succeed(*flags)
        self.assertIn("Starting from the weights in", out)
        self.assertIn("Saved the adapter for transformers and PEFT to", out)
        self.assertEqual(metrics_of(self.adapters)[0]["val_rewards/margins"], 0)
        exported = self.adapters / "peft"
        trained = load(str(self.model), adapter_path=str(self.adapters))[0]
        again = load(str(self.model))[0]
        close(logits(started(exported, again)[0]), logits(trained))
        files = [exported / name for name in PEFT_FILES]
        kept = [file.read_bytes() for file in files]
        for file in files:
            file.unlink()
        # The same of a finished run, which needs neither data nor model.
        self.succeed("--adapter-path", self.adapters, "--peft")
        self.assertEqual([file.read_bytes() for file in files], kept)
        # A later run does not keep an earlier one's.
        self.succeed(*self.flags())
        self.assertEqual([*exported.iterdir()], [])


if __name__ == "__main__":
    unittest.main()
