# Copyright © 2026 MLX Contributors

"""Each setting of the table changes what it says, in two short runs that differ in it."""

import contextlib
import io
import json
import re
import shutil
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import numpy as np
from resuming import MEASURED
from tiny import HAS_MATPLOTLIB, ROWS, save_rows, save_tiny_model

from mlx_lm import dpo
from mlx_lm.preference.data import cache as token_cache
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.memory.predict import MemoryEstimate
from mlx_lm.preference.run import forecast
from mlx_lm.preference.settings.table import SETTINGS


class Effect(NamedTuple):
    """What a setting's other value changes, in runs that have something in common."""

    # Weights, metrics, files, what is printed, or whether the run stops.
    what: str
    value: Any
    both: dict[str, Any] = {}
    # Without the setting, these of the other run have no effect.
    more: dict[str, Any] = {}


_ROOT = Path("/ROOT")  # the folder of all runs
LEFT = ("adapters", "references", "tokens", "elsewhere")
_LABELS = {"data": "labels", "loss_type": "kto", "batch_size": 4}
_MOVES = {"sync_reference": True, "sync_steps": 1, "iters": 3}
_TESTED = {"test": True}
_EVERY = {"save_every": 1}
EFFECTS = {
    "train": Effect("stops", False),
    "test": Effect("files", True),
    "inspect": Effect("printed", 1),
    "adapter_path": Effect("files", str(_ROOT / "elsewhere")),
    "peft": Effect("files", True),
    "epochs": Effect("weights", 1),
    "test_batches": Effect("metrics", 1, _TESTED),
    "share_prompt": Effect("metrics", False),
    "pack": Effect("metrics", True),
    # Refused without resume.
    "restart": Effect("stops", True),
    "dry_run": Effect("files", True),
    "model": Effect("weights", str(_ROOT / "other_model")),
    "fine_tune_type": Effect("weights", "dora"),
    "num_layers": Effect("weights", 2),
    "lora_parameters": Effect("weights", {"rank": 4}),
    "train_head": Effect("weights", True, {"fine_tune_type": "full"}),
    "reference_model": Effect("metrics", str(_ROOT / "other_model")),
    "reference_bits": Effect(
        "metrics", 4, {"reference_model": str(_ROOT / "other_model")}
    ),
    "policy_adapter_file": Effect("weights", str(_ROOT / "dpo/adapters.safetensors")),
    "resume_adapter_file": Effect("weights", str(_ROOT / "sft")),
    "new_reference": Effect("stops", True, {"resume_adapter_file": str(_ROOT / "dpo")}),
    "optimizer": Effect("weights", "sgd"),
    "optimizer_config": Effect("weights", {"adam": {"betas": [0.5, 0.9]}}),
    "learning_rate": Effect("weights", 2e-2),
    "lr_schedule": Effect("weights", "linear"),
    "warmup_steps": Effect("weights", 1),
    "data": Effect("weights", "other"),
    "data_dir": Effect("weights", "other", {"data": ".", "data_dir": "pairs"}),
    "prompt_feature": Effect("weights", "question"),
    "chosen_feature": Effect("weights", "better"),
    "rejected_feature": Effect("weights", "worse"),
    "weight_feature": Effect("weights", "sure"),
    "margin_feature": Effect("weights", "gap"),
    "criteria": Effect(
        "weights",
        {"kind": 1, "short": 0.5},
        {"data": "criteria", "criteria": {"kind": 1}},
    ),
    "ranking_pairs": Effect("weights", "best_and_worst", {"data": "rankings"}),
    "wrap_text": Effect("weights", True, {"data": "texts"}),
    "escape_special_tokens": Effect("weights", True, {"data": "special"}),
    "transcripts": Effect("weights", "raw", {"data": "transcripts"}),
    "max_bad_rows": Effect("stops", 0.5, {"data": "faulty"}),
    "valid_fraction": Effect("weights", 0.5, {"data": "alone"}),
    "max_rows": Effect("weights", 3),
    "reference_cache": Effect("files", str(_ROOT / "references")),
    "token_cache": Effect("files", str(_ROOT / "tokens")),
    "beta": Effect("weights", 0.5),
    "loss_type": Effect("weights", "hinge"),
    "loss_weights": Effect("weights", [1, 0.5], {"loss_type": ["sigmoid", "sft"]}),
    "label_smoothing": Effect("weights", 0.2),
    "f_divergence": Effect("weights", "js"),
    "f_alpha": Effect("metrics", 0.9, {"f_divergence": "alpha"}),
    "ld_alpha": Effect("weights", 0.5),
    "use_weighting": Effect("weights", True),
    "reference_free": Effect("weights", True),
    "gamma": Effect("weights", 1.0, {"loss_type": "simpo"}),
    "alphapo_alpha": Effect("weights", 1.0, {"loss_type": "alphapo"}),
    "cpo_alpha": Effect("weights", 0.5, {"loss_type": "cpo"}),
    "dpop_lambda": Effect("weights", 5.0, {"loss_type": "dpop"}),
    "discopop_tau": Effect("weights", 0.5, {"loss_type": "discopop"}),
    "desirable_weight": Effect("weights", 2.0, _LABELS),
    "undesirable_weight": Effect("weights", 2.0, _LABELS),
    "batch_size": Effect("weights", 3),
    "iters": Effect("weights", 3),
    "val_batches": Effect("metrics", 2),
    "steps_per_report": Effect("metrics", 2),
    "steps_per_eval": Effect("metrics", 1),
    "save_every": Effect("files", 1),
    "max_seq_length": Effect("weights", 40),
    "grad_accumulation_steps": Effect("weights", 2),
    "max_grad_norm": Effect("weights", 1e-3),
    "debug_gradients": Effect("metrics", True),
    "keep_checkpoints": Effect("files", 1, _EVERY),
    "save_best": Effect("files", "loss"),
    "early_stopping": Effect("weights", 1, {"iters": 6, "steps_per_eval": 1}),
    "load_best": Effect("weights", True, {"iters": 6, "steps_per_eval": 1}),
    "sync_reference": Effect(
        "metrics", True, {"iters": 3}, {"sync_steps": 1, "sync_alpha": 0.6}
    ),
    "sync_alpha": Effect("metrics", 0.1, _MOVES),
    "sync_steps": Effect("metrics", 2, _MOVES),
    "seed": Effect("weights", 1),
    "report": Effect("files", True),
    "sample_prompts": Effect("files", ["Say tea."]),
    "sample_tokens": Effect("files", 1, {"sample_prompts": ["Say tea."]}),
    "retain_data": Effect("files", str(_ROOT / "ordinary.txt")),
    # Refused beside data; what they do is in test_collect_rounds.
    "rounds": Effect("stops", 2),
}
# Refused without rounds.
_OF_ROUNDS = {
    **{"prompts": "x", "held_out_prompts": "x", "judge": "x", "prompts_per_round": 3},
    **{"judge_timeout": 3.0},
    **{"samples": 3, "temperature": 0.5, "top_p": 0.5, "max_tokens": 7},
    **{"generate_batch_size": 7, "pairs": "all", "reference": "round"},
    **{"iters_per_round": 3, "epochs_per_round": 2, "replay": 0.5},
}
EFFECTS |= {name: Effect("stops", value) for name, value in _OF_ROUNDS.items()}
# What another value changes nothing of, and why.
WITHOUT_EFFECT = {
    "mask_prompt": (True, "prompts are never scored; said so, for mlx_lm.lora has it"),
    "grad_checkpoint": (True, "saves memory, computes the same"),
    "clear_cache_threshold": (1, "decides what memory the allocator keeps"),
    "trust_remote_code": (True, "only of models that bring code along"),
    "resume_anyway": (True, "only of a run that is resumed"),
    "max_skipped_steps": (1, "only of steps whose numbers are not finite"),
    "project_name": ("other", "only of trackers, which report_to names"),
}
# What two short runs can't show, and the tests that do.
SHOWN_BY = {
    "config": "test_dpo_config.TestResolveArgs.test_command_line_beats_yaml_beats_defaults",
    "template_date": "test_token_cache.TestHits.test_templates_with_a_date",
    "hf_dataset": "test_preference_files.TestHub.test_hf_dataset_list",
    "resume": "test_resume.TestEveryStep.test_resumed_at_every_step",
    "report_to": "test_tracking.TestTracking.test_trackio_beside_another",
}


def write_data(root):
    """The pairs of most runs, with columns to choose from, and rows of other kinds."""
    pairs, other, labels, texts, transcripts, criteria = [], [], [], [], [], []
    for i, row in enumerate(ROWS[:6]):
        word = row["chosen"][0]["content"]
        user = [{"role": "user", "content": f"Say {word}{' now' * (i % 3)}."}]
        pair = {"prompt": user, "chosen": word, "rejected": f"no {word}, ever{'!' * i}"}
        more = {"better": f"{word}, sir", "worse": "oh", "question": row["prompt"]}
        pairs.append({**pair, **more, "gap": 0.1 * i, "sure": 1 + i})
        other.append({**pair, "rejected": "what?"})
        labels.append({"prompt": user, "completion": word, "label": i % 2})
        text = {"prompt": f"Say {word}: ", "chosen": word, "rejected": f"not {word}"}
        texts.append(text)
        start = f"\n\nHuman: Say {word}.\n\nAssistant:"
        answers = {"chosen": f"{start} {word}", "rejected": f"{start} never {word}"}
        transcripts.append(answers)
        kinds = {"kind": {"chosen": word, "rejected": f"no {word}"}}
        kinds["short"] = {"chosen": word, "rejected": f"well then, {word}"}
        criteria.append({"prompt": user, "criteria": kinds})
    save_rows(root / "pairs", pairs)
    save_rows(root / "other", other)
    save_rows(root / "labels", labels)
    save_rows(root / "texts", texts)
    ranked = [(x["prompt"], [x["chosen"], "well", x["rejected"]]) for x in texts]
    save_rows(root / "rankings", [{"prompt": p, "ranking": r} for p, r in ranked])
    save_rows(root / "special", [{**x, "prompt": f"</s>{x['prompt']}"} for x in texts])
    save_rows(root / "transcripts", transcripts)
    save_rows(root / "criteria", criteria)
    save_rows(root / "faulty", [*pairs[:3], {"prompt": "no answer"}])
    save_rows(root / "alone", pairs, ("train",))
    (root / "ordinary.txt").write_text("The sun is up and the tea is hot. " * 40)


def weights_in(adapters):
    file = adapters / "adapters.safetensors"
    arrays = mx.load(str(file)) if file.exists() else {}
    return {name: np.array(x) for name, x in arrays.items()}


def numbers_in(adapters):
    """What was reported of training, validation and test, without speeds."""
    numbers = {}
    for name in ("metrics.jsonl", "test_metrics.json"):
        text = (adapters / name).read_text() if (adapters / name).exists() else ""
        lines = text.splitlines() if name.endswith("l") else [text or "{}"]
        for i, line in enumerate(map(json.loads, lines)):
            for key, x in line.items():
                if key not in MEASURED:
                    is_number = isinstance(x, (int, float))
                    numbers[name, i, key] = np.array(x if is_number else np.nan)
    return numbers


def files_in(root):
    """The files that a run leaves, with the answers in them."""
    found = {}
    for folder in LEFT:
        for path in (root / folder).rglob("*.*"):
            text = path.read_text() if path.name == "samples.jsonl" else ""
            found[str(path.relative_to(root))] = text
    return found


def changes(before, after):
    """The kinds of what differs between two outcomes, beyond rounding."""
    found = []
    for what, old in before.items():
        new = after[what]
        if what in ("weights", "metrics"):
            same = old.keys() == new.keys() and all(
                x.shape == new[k].shape
                and np.allclose(x, new[k], rtol=1e-5, atol=1e-6, equal_nan=True)
                for k, x in old.items()
            )
        else:
            same = old == new
        found += [what] * (not same)
    return found


class TestEffects(unittest.TestCase):
    known: dict[str, dict] = {}

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.root = Path(folder.name)
        save_tiny_model(cls.root / "model", num_hidden_layers=2)
        save_tiny_model(cls.root / "other_model", num_hidden_layers=3)
        write_data(cls.root)
        estimate = mock.Mock(return_value=MemoryEstimate(0, 0, 0, 0, 0))
        for patch in (
            # Predicting a step takes as long as the run.
            mock.patch.object(forecast, "check_memory", estimate),
            mock.patch.object(token_cache, "MIN_ROWS", 2),
        ):
            patch.start()
            cls.addClassCleanup(patch.stop)
        cls.known = {"{}": cls.outcome({})}
        shutil.copytree(cls.root / "adapters", cls.root / "dpo")
        sft = shutil.copytree(cls.root / "dpo", cls.root / "sft")
        config = json.loads((sft / "adapter_config.json").read_text())
        config.pop("trained_with")
        (sft / "adapter_config.json").write_text(json.dumps(config))

    @classmethod
    def outcome(cls, settings):
        """What a run leaves behind, by kind."""
        adapters = cls.root / "adapters"
        for name in LEFT:
            shutil.rmtree(cls.root / name, ignore_errors=True)
        words = json.dumps(settings).replace(str(_ROOT), str(cls.root))
        data = {"data": "pairs"}
        settings = data | json.loads(words)
        settings["data"] = str(cls.root / settings["data"])
        common = {
            **{"model": str(cls.root / "model"), "train": True, "num_layers": 1},
            **{"adapter_path": str(adapters), "iters": 2, "batch_size": 2},
            **{"learning_rate": 1e-2, "steps_per_report": 1, "val_batches": 1},
            **{"max_seq_length": 64, "token_cache": False, "reference_cache": False},
        }
        printed, stops = io.StringIO(), ""
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                dpo.run(SimpleNamespace(**(common | settings)))
            except InputError as e:
                stops = str(e)
        return {
            "stops": stops,
            "printed": re.findall(r"\d+ of \d+ · .*", printed.getvalue()),
            "weights": weights_in(adapters),
            "metrics": numbers_in(adapters),
            "files": files_in(cls.root),
        }

    def both(self, name):
        """The outcomes of two runs that differ in a setting alone."""
        effect = EFFECTS[name]
        key = json.dumps(effect.both, sort_keys=True)
        if key not in self.known:
            self.known[key] = self.outcome(effect.both)
        changed = effect.both | {name: effect.value} | effect.more
        return self.known[key], self.outcome(changed)

    def test_every_setting_is_listed(self):
        listed = [*EFFECTS, *WITHOUT_EFFECT, *SHOWN_BY]
        self.assertEqual(sorted(listed), sorted(SETTINGS))
        for name, test in SHOWN_BY.items():
            loader = unittest.TestLoader()
            loader.loadTestsFromName(test)
            self.assertEqual(loader.errors, [], name)

    def test_other_values_change_what_they_say(self):
        for name, effect in EFFECTS.items():
            with self.subTest(setting=name):
                if name == "report" and not HAS_MATPLOTLIB:
                    self.skipTest("needs matplotlib")
                before, after = self.both(name)
                found = changes(before, after)
                self.assertIn(effect.what, found)
                if effect.what != "stops":
                    self.assertEqual((before["stops"], after["stops"]), ("", ""))

    def test_what_changes_nothing_changes_nothing(self):
        before = self.known["{}"]
        # The same run again, to begin with.
        for name, (value, why) in {"beta": (0.1, "default"), **WITHOUT_EFFECT}.items():
            with self.subTest(setting=name, why=why):
                self.assertEqual(changes(before, self.outcome({name: value})), [])


if __name__ == "__main__":
    unittest.main()
