# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import tempfile
import unittest
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlx.optimizers as optim
import yaml

from mlx_lm import dpo, lora
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.objective.objective import Objective
from mlx_lm.preference.policy.optimizer import OPTIMIZERS, build_optimizer
from mlx_lm.preference.run.folder import saved_settings
from mlx_lm.preference.run.setup import training_args
from mlx_lm.preference.setting import Setting
from mlx_lm.preference.settings.adopt import adopt_resumed_run
from mlx_lm.preference.settings.checks import (
    check_args,
    check_keys,
    check_types,
    fit_to_model,
)
from mlx_lm.preference.settings.parser import build_parser
from mlx_lm.preference.settings.table import SETTINGS, names
from mlx_lm.tuner.trainer import DPOTrainingArgs, TrainingArgs

# Another value than the default for each flag.
VALUES = {bool: True, int: 7, float: 0.25, str: "other"}
CHOICES = {
    "reference_bits": 8,
    "loss_type": "hinge",
    "f_divergence": "js",
    "fine_tune_type": "dora",
    "optimizer": "sgd",
    "save_best": "loss",
    "pairs": "all",
    "reference": "round",
}


def quiet_resolve(*argv):
    with contextlib.redirect_stdout(io.StringIO()):
        return dpo.resolve_args(list(argv))


def flag_values():
    """For each flag its option, its key and a value as words and as is."""
    for action in dpo.build_parser()._actions:
        key = action.dest
        if key in ("help", "config"):
            continue
        if action.nargs == 0:
            for option in action.option_strings:
                # Of two, one of them says no.
                no = option.startswith("--no-") and len(action.option_strings) > 1
                yield option, key, [], not no if action.const is None else action.const
            continue
        kind = action.type if isinstance(action.type, type) else int
        value = CHOICES.get(key, VALUES[kind])
        yield action.option_strings[-1], key, [str(value)], value


class TestResolveArgs(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.file = Path(folder.name) / "dpo.yaml"

    def resolve(self, config, *argv):
        text = config if isinstance(config, str) else yaml.safe_dump(config)
        self.file.write_text(text)
        return quiet_resolve("-c", str(self.file), *argv)

    def test_parser_defaults_are_none(self):
        given = vars(dpo.build_parser().parse_args([]))
        self.assertEqual(set(given.values()), {None})

    def test_every_flag_of_lora_is_there(self):
        options = lambda parser: {o for a in parser._actions for o in a.option_strings}
        ours, theirs = options(dpo.build_parser()), options(lora.build_parser())
        self.assertLessEqual(theirs, ours)
        new = "beta reference-model loss-type label-smoothing epochs max-grad-norm"
        self.assertLessEqual({f"--{n}" for n in new.split()}, ours)
        self.assertLessEqual(set(lora.CONFIG_DEFAULTS), set(dpo.CONFIG_DEFAULTS))

    def test_every_flag_has_a_key(self):
        keys = {key for _, key, _, _ in flag_values()}
        self.assertLessEqual(keys, set(dpo.CONFIG_DEFAULTS))

    def test_defaults(self):
        args = quiet_resolve()
        for key, value in dpo.CONFIG_DEFAULTS.items():
            self.assertEqual(getattr(args, key), value)
        self.assertEqual(args.explicit, set())
        self.assertEqual((args.beta, args.max_seq_length), (0.1, 2048))

    def test_command_line_beats_yaml_beats_defaults(self):
        for option, key, words, value in flag_values():
            with self.subTest(key=key):
                self.assertEqual(getattr(quiet_resolve(option, *words), key), value)
                in_yaml = 3 if not isinstance(value, str) else value + "_yaml"
                args = self.resolve({key: in_yaml})
                self.assertEqual(getattr(args, key), in_yaml)
                self.assertEqual(args.explicit, {key})
                args = self.resolve({key: in_yaml}, option, *words)
                self.assertEqual(getattr(args, key), value)

    def test_keys_without_a_flag(self):
        for key, default in dpo.CONFIG_DEFAULTS.items():
            if key == "config":
                continue
            with self.subTest(key=key):
                value = {"a": 1} if isinstance(default, dict) else "something"
                self.assertEqual(getattr(self.resolve({key: value}), key), value)

    def test_null_means_default(self):
        args = self.resolve(dict.fromkeys(dpo.CONFIG_DEFAULTS))
        for key, default in dpo.CONFIG_DEFAULTS.items():
            if key != "config":
                self.assertEqual(getattr(args, key), default)
        self.assertEqual(args.explicit, set())

    def test_a_list_of_one_folder(self):
        self.assertEqual(self.resolve({"adapter_path": ["a"]}).adapter_path, "a")
        folders = self.resolve({"adapter_path": ["a", "b"]}).adapter_path
        self.assertEqual(folders, ["a", "b"])

    def test_empty_file(self):
        self.assertEqual(self.resolve("# nothing\n").beta, 0.1)

    def test_numbers(self):
        args = self.resolve("learning_rate: 1e-6\nbeta: 5e-1\n")
        self.assertEqual((args.learning_rate, args.beta), (1e-6, 0.5))

    def test_unknown_key(self):
        for key, close in {
            "learning_rates": "learning_rate",
            "batchsize": "batch_size",
        }.items():
            with self.assertRaisesRegex(ValueError, f"{key!r}.*mean {close!r}"):
                self.resolve({key: 1})
        with self.assertRaisesRegex(ValueError, r"'qqq' in the config\. See"):
            self.resolve({"qqq": 1})

    def test_keys_of_other_data_are_accepted(self):
        config = dict.fromkeys(("text_feature", "completion_feature", "chat_feature"))
        self.resolve({key: "x" for key in config})

    def test_not_a_mapping(self):
        with self.assertRaisesRegex(ValueError, "keys and values"):
            self.resolve("- beta\n")


class TestChecks(unittest.TestCase):
    def checked(self, **settings):
        args = quiet_resolve("--train", "--data", "d")
        vars(args).update(settings)
        args.explicit |= set(settings)
        check_args(args)
        return args

    def test_learning_rate_suits_the_kind(self):
        for kind, rate in {"lora": 1e-5, "dora": 1e-5, "full": 1e-6}.items():
            self.assertEqual(self.checked(fine_tune_type=kind).learning_rate, rate)
        self.assertEqual(self.checked(learning_rate=1e-3).learning_rate, 1e-3)

    def test_letter_case_of_the_optimizer(self):
        self.assertEqual(self.checked(optimizer="AdamW").optimizer, "adamw")

    def test_every_known_setting_of_hf_dataset(self):
        dataset = {
            **dict.fromkeys(("train_split", "valid_split", "test_split"), "train[:9]"),
            **dict.fromkeys(("prompt_feature", "chosen_feature"), "x"),
            **{"path": "p", "rejected_feature": "x", "config": {"name": "en"}},
            **{"text_feature": "x", "completion_feature": "x", "chat_feature": "x"},
        }
        self.checked(data=None, hf_dataset=dataset)
        self.checked(data=None, hf_dataset=[dataset, {"path": "q"}])

    def test_out_of_range(self):
        for settings in (
            *({key: 0} for key in names(least=1, all=False)),
            *({"val_batches": n} for n in (0, -2)),
            {"max_grad_norm": -1.0},
            {"learning_rate": float("nan")},
            {"lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 1.0}},
        ):
            with self.subTest(settings=settings):
                with self.assertRaisesRegex(ValueError, next(iter(settings))):
                    self.checked(**settings)

    def test_old_adapters_may_have_more_lora_keys(self):
        args = quiet_resolve("--train", "--data", "d")
        args.lora_parameters = {**args.lora_parameters, "alpha": 16}
        check_args(args)
        with self.assertRaisesRegex(ValueError, "'alpha' in lora_parameters"):
            self.checked(lora_parameters=args.lora_parameters)

    def test_types(self):
        good = {"iters": 3, "beta": 1, "train": True, "data": "d", "epochs": None}
        check_types({**good, "lr_schedule": "cosine", "own": object()})
        for key, value in {
            **{"iters": True, "beta": "0.1", "train": 1, "data": 5, "epochs": 1.5},
            **{"optimizer": ["adam"], "optimizer_config": "adam", "warmup_steps": "3"},
        }.items():
            with self.subTest(key=key):
                with self.assertRaisesRegex(ValueError, f"{key} must be .*, got"):
                    check_types({key: value})

    def test_keys(self):
        check_keys({"beta": 1}, ["beta"])
        with self.assertRaisesRegex(ValueError, "'bet' in here, did you mean 'beta'"):
            check_keys({"bet": 1}, ["beta"], "here")


class TestOptimizers(unittest.TestCase):
    def test_options(self):
        config = {"adamw": {"betas": [0.8, 0.9], "weight_decay": 0.5}, "sgd": None}
        optimizer = build_optimizer("adamw", 0.1, config)
        self.assertIsInstance(optimizer, optim.AdamW)
        self.assertEqual((optimizer.betas, optimizer.weight_decay), ([0.8, 0.9], 0.5))
        self.assertIsInstance(build_optimizer("sgd", 0.1, config), optim.SGD)
        for name, kind in OPTIMIZERS.items():
            self.assertIsInstance(build_optimizer(name, 0.1, {}), kind)

    def test_unknown_option(self):
        with self.assertRaisesRegex(ValueError, "optimizer_config.adam .*momentum"):
            build_optimizer("adam", 0.1, {"adam": {"momentum": 0.9}})

    def test_options_that_only_an_update_reads(self):
        for name, options in (
            ("adam", {"betas": [0.9]}),
            ("adamw", {"weight_decay": "0.01"}),
            ("adafactor", {"eps": 1e-8}),
            ("adafactor", {"eps": []}),
            ("sgd", {"momentum": None}),
            ("muon", {"ns_steps": 2.5}),
        ):
            with self.subTest(name, **options):
                with self.assertRaisesRegex(ValueError, f"optimizer_config.{name} .*"):
                    build_optimizer(name, 0.1, {name: options})


class TestFitToModel(unittest.TestCase):
    def fit(self, config, layers=4, **given):
        args = quiet_resolve()
        vars(args).update(given)
        args.explicit = set(given)
        model = SimpleNamespace(layers=[0] * layers, args=SimpleNamespace(**config))
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            fit_to_model(args, model)
        return args.num_layers, args.max_seq_length, screen.getvalue()

    def test_defaults_are_clamped(self):
        self.assertEqual(self.fit({}), (4, 2048, ""))
        for config in (
            {"max_position_embeddings": 512},
            {"n_positions": 512, "n_ctx": 1024},
            {"text_config": {"max_position_embeddings": 512}},
        ):
            layers, length, screen = self.fit(config, layers=32)
            self.assertEqual((layers, length), (16, 512))
            self.assertIn("max_seq_length is 512", screen)
        unknown = {"max_position_embeddings": None}
        self.assertEqual(self.fit(unknown, num_layers=-1)[:2], (-1, 2048))

    def test_given_ones_are_refused(self):
        with self.assertRaisesRegex(ValueError, "num_layers is 5 .* 4 layers"):
            self.fit({}, num_layers=5)
        with self.assertRaisesRegex(ValueError, "max_seq_length is 9 .* 8 positions"):
            self.fit({"n_positions": 8}, max_seq_length=9)


class TestSettings(unittest.TestCase):
    def test_what_is_saved(self):
        args = quiet_resolve("--beta", "0.3")
        settings = saved_settings(vars(args))
        self.assertEqual(settings.pop("trained_with"), "mlx_lm.dpo")
        self.assertIn("mlx", settings.pop("versions"))
        self.assertEqual(settings, {**dpo.CONFIG_DEFAULTS, "beta": 0.3})

    def test_what_the_loop_gets(self):
        other = {"save_every": "steps_per_save"}
        values = {
            "batch_size": 3,
            "iters": 5,
            "val_batches": 6,
            "steps_per_report": 7,
            "steps_per_eval": 8,
            "save_every": 9,
            "max_seq_length": 10,
            "grad_checkpoint": True,
            "grad_accumulation_steps": 11,
            "clear_cache_threshold": 12,
            "beta": 0.3,
            "label_smoothing": 0.25,
            "max_grad_norm": 0.5,
            "seed": 13,
            "sync_steps": 14,
        }
        args = quiet_resolve()
        vars(args).update(values, adapter_path="folder")
        loop = training_args(args)
        for key, value in values.items():
            self.assertEqual(getattr(loop, other.get(key, key)), value)
        self.assertEqual(loop.objective, Objective(0.3, label_smoothing=0.25))
        self.assertEqual(Path(loop.adapter_file), Path("folder/adapters.safetensors"))


class TestTable(unittest.TestCase):
    """A setting is declared once; all else follows."""

    def test_one_that_is_added_is_everywhere(self):
        new = Setting("warmth", 3, "How warm.", least=1, tested=True, per_dataset=True)
        with mock.patch.dict(SETTINGS, {"warmth": new}):
            action = build_parser()._option_string_actions["--warmth"]
            self.assertEqual((action.type, action.help), (int, "How warm. Default: 3."))
            self.assertIn("warmth", names(tested=True))
            self.assertIn("warmth", names(per_dataset=True))
            with self.assertRaisesRegex(InputError, "warmth must be a whole number"):
                check_types({"warmth": "hot"})
            args = quiet_resolve("--train", "--data", "d")
            args.warmth = 0
            with self.assertRaisesRegex(InputError, "warmth must be at least 1, got 0"):
                check_args(args)
            with tempfile.TemporaryDirectory() as folder:
                config = {**dpo.CONFIG_DEFAULTS, "trained_with": "mlx_lm.dpo"}
                Path(folder, "adapter_config.json").write_text(
                    json.dumps({**config, "warmth": 4})
                )
                args = quiet_resolve("--resume", folder)
                args.warmth, args.explicit = 5, {"warmth"}
                with self.assertRaisesRegex(InputError, "warmth is 5, but the run in"):
                    adopt_resumed_run(args)

    def test_what_mlx_lm_lora_has_keeps_its_default(self):
        # These are not lora's: the data's, and those that depend on others.
        other = {"data", "learning_rate", "clear_cache_threshold"}
        for key, default in lora.CONFIG_DEFAULTS.items():
            if key not in other:
                self.assertEqual(SETTINGS[key].default, default, key)

    def test_every_one_has_a_help_and_a_type_of_its_default(self):
        for name, one in SETTINGS.items():
            with self.subTest(name=name):
                self.assertRegex(one.help, r"\.$")
                check_types({name: one.default})
                self.assertIn(one.resume, ("free", "same", "shape"))


class TestTrainingArgs(unittest.TestCase):
    def test_one_truth_a_value(self):
        args = DPOTrainingArgs(loss_type="ipo", iters=3)
        self.assertEqual(replace(args, beta=0.5).objective, Objective(0.5, "ipo"))
        with self.assertRaises(FrozenInstanceError):
            args.beta = 0.5

    def test_has_what_training_args_have(self):
        theirs = {field.name for field in fields(TrainingArgs)}
        self.assertLessEqual(theirs, {field.name for field in fields(DPOTrainingArgs)})


if __name__ == "__main__":
    unittest.main()
