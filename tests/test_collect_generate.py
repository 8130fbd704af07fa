# Copyright © 2026 MLX Contributors

"""Prompts and the answers to them: read, generated, kept, and gone on with."""

import contextlib
import datetime
import io
import json
import shutil
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
import pyarrow
from collecting import collect
from pyarrow import parquet
from test_folder_lock import taken
from tiny import float64_logps, save_tiny_model

from mlx_lm.preference.collect import generate
from mlx_lm.preference.collect.answers import read_answers
from mlx_lm.preference.collect.generate import Sampling, load_answering_model
from mlx_lm.preference.collect.progress import seconds_left
from mlx_lm.preference.collect.prompts import read_prompts
from mlx_lm.preference.data.tokenizer import PairTokenizer

WORDS = "tea hat pen cup sun ink map oak bee jam".split()
TURNS = [{"role": "user", "content": "Say tea."}]


class Folder(unittest.TestCase):
    """A folder with a tiny model, and the command."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.model = str(save_tiny_model(Path(folder.name) / "model"))

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.out = self.folder / "out"

    def write(self, name, content):
        path = self.folder / name
        if not isinstance(content, (str, bytes)):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def collect(self, prompts, *more, out=None, model=None):
        """The command; what it printed, and its exit code."""
        argv = ["--model", model or self.model, "--prompts", prompts]
        argv += ["--output", str(out or self.out), "--samples", "3"]
        argv += ["--max-tokens", "8", "--batch-size", "6", *more]
        code, printed, errors = collect(*argv)
        return printed + errors, code

    def text(self, n=10):
        return self.write("prompts.txt", "".join(f"Say {w}.\n" for w in WORDS[:n]))


class TestPrompts(Folder):
    def read(self, name, content):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            rows = read_prompts(self.write(name, content))
        return rows, printed.getvalue()

    def test_kinds(self):
        turns = [{"role": "user", "content": "Say tea."}]
        answer = {"role": "assistant", "content": "tea"}
        cases = {
            "a.txt": "Say tea.\r\n\n",
            "b.jsonl": [{"prompt": "Say tea.", "names": "tea"}],
            "c.jsonl": [{"messages": turns}],
            "d.jsonl": [{"messages": [*turns, answer]}],
            "e.jsonl": [{"prompt": turns, "chosen": "tea", "rejected": "no tea"}],
            "f.jsonl": [
                {
                    "chosen": [*turns, answer],
                    "rejected": [*turns, {**answer, "content": "x"}],
                }
            ],
            "g.jsonl": [{"question": "Say tea."}],
            "h.csv": "prompt,names\nSay tea.,tea\n",
        }
        for name, content in cases.items():
            with self.subTest(name):
                (row,), _ = self.read(name, content)
                text = row.prompt
                self.assertIn(text, ("Say tea.", turns))
                self.assertEqual(row.row, {"names": "tea"} if name[0] in "bh" else {})

    def test_names(self):
        rows, printed = self.read(
            "a.jsonl",
            [
                {"id": 7, "prompt": "a"},
                {"prompt": "b"},
                {"prompt": "b"},
                {"prompt": "d", "id": "x"},
            ],
        )
        self.assertEqual([row.prompt for row in rows], ["a", "b", "d"])
        self.assertEqual([rows[0].id, rows[2].id], ["7", "x"])
        self.assertIn(
            "1 row: a prompt that was there before (first: a.jsonl:3)", printed
        )
        # The same name in every process, and on every machine.
        self.assertEqual(rows[1].id, read_prompts(self.write("b.txt", "b"))[0].id)

    def test_bad_files_get_one_line(self):
        cases = {
            "twice.jsonl": (
                [{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}],
                "'1'",
            ),
            "none.jsonl": ([{"prompt": ""}], "has no prompt"),
            "empty.txt": ("\n\n", "has no prompt"),
            "json.txt": ([{"prompt": "a"}], "json.jsonl"),
            "picture.txt": (b"\x89PNG\r\n\xff\xfe", "not UTF-8 text"),
            "zeros.txt": (b"a\0b", "not UTF-8 text"),
            "broken.jsonl": ("{", "JSON"),
            "list.jsonl": ("[1, 2]", "no JSON object"),
        }
        for name, (content, said) in cases.items():
            with self.subTest(name):
                printed, code = self.collect(self.write(name, content))
                self.assertEqual(code, 2, printed)
                self.assertIn(said, printed.splitlines()[-1])
                self.assertFalse(self.out.exists())

    def test_bad_rows_are_skipped_up_to_a_share_as_those_of_data(self):
        bad = [
            {"prompt": " "},
            {"other": "c"},
            {"prompt": "a", "id": [1]},
            # What only the model's template finds.
            {"prompt": [{"role": "critic", "content": "x"}, *TURNS]},
            {"prompt": "b", "chat_template_kwargs": {"tokenize": True}},
        ]
        whole = [{"prompt": f"Say {w} {i}."} for i in range(5) for w in WORDS]
        printed, code = self.collect(self.write("a.jsonl", [bad[3], *whole, *bad]))
        self.assertEqual(code, 0, printed)
        self.assertEqual(len(read_answers(self.out)), 50)
        for said in (
            "1 row: empty prompt (first: a.jsonl:52)",
            "1 row: missing column (first: a.jsonl:53, prompt)",
            "1 row: wrong type (first: a.jsonl:54, id is list)",
            "1 row: unknown role (first: a.jsonl:1, critic",
            "1 row: not a variable of the template (first: a.jsonl:56, ",
        ):
            self.assertIn(f"[WARNING] Skipped {said}", printed)
        self.assertIn("1 row: a prompt that was there before", printed)
        for rows, most in (([bad[0]], "0.1"), ([bad[3]], "0.1"), (bad[:2], "0.2")):
            prompts = self.write("b.jsonl", [*whole[:7], *rows])
            out = {"out": self.folder / "other"}
            given = () if most == "0.1" else ("--max-bad-rows", most)
            printed, code = self.collect(prompts, *given, **out)
            self.assertEqual(code, 2, printed)
            self.assertIn(
                f"of {7 + len(rows)} rows are bad, more than max_bad", printed
            )
            self.assertIn(f"max_bad_rows ({most}) allows. Most often 1 row: ", printed)
            printed, code = self.collect(prompts, "--max-bad-rows", "0.3", **out)
            self.assertEqual(code, 0, printed)
            shutil.rmtree(self.folder / "other")

    def test_columns_that_json_has_not(self):
        time = datetime.datetime(2026, 1, 31)
        turns = [{"role": "user", "content": "Say tea.", "time": time}]
        rows = [{"messages": turns, "time": time, "raw": b"\xff", "names": "tea"}]
        path = self.folder / "a.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        printed, code = self.collect(str(path))
        self.assertEqual(code, 0, printed)
        (line,) = read_answers(self.out)
        self.assertEqual((line.row["time"], line.row["names"]), (str(time), "tea"))


class TestAnswers(Folder):
    def test_tokens_ends_and_logps(self):
        printed, code = self.collect(self.text())
        self.assertEqual(code, 0, printed)
        self.assertIn("30/30 answers", printed)
        model, tokenizer = load_answering_model(self.model)
        lines = read_answers(self.out)
        self.assertEqual(len(lines), 10)
        ends = set()
        for line in lines:
            self.assertEqual(line.sampling["max_tokens"], 8)
            self.assertLessEqual(len(line.responses), 3)
            ids = PairTokenizer(tokenizer).prompt_ids(line.prompt, {})
            for one in line.responses:
                ends.add(one.finish)
                is_stop = one.finish == "stop"
                eos = [t in tokenizer.eos_token_ids for t in one.tokens]
                self.assertEqual(sum(eos), is_stop)
                self.assertEqual(eos[-1], is_stop)
                said = one.tokens[:-1] if is_stop else one.tokens
                self.assertEqual(one.text, tokenizer.decode(said))
                # The plain forward of the whole sequence, without any cache.
                logits = model(mx.array([ids + one.tokens]))[:, len(ids) - 1 : -1]
                expected = float64_logps(logits, [one.tokens], np.ones(len(one.tokens)))
                self.assertAlmostEqual(one.logps, expected.item(), delta=1e-3)
        self.assertIn("length", ends)

    def biased(self, tokens):
        """A model that says little else than some tokens."""
        model, tokenizer = load_answering_model(self.model)
        bias = np.full(model.args.vocab_size, -30.0, np.float32)
        bias[tokens] = 0.0

        class Biased(type(model)):
            def __call__(self, *args, **kwargs):
                return super().__call__(*args, **kwargs) * 0 + mx.array(bias)

        model.__class__ = Biased
        return model, tokenizer

    def answers(self, model, tokenizer, **sampling):
        rows = read_prompts(self.text(4))
        given = {"samples": 4, "max_tokens": 6, "batch_size": 8, **sampling}
        self.out.mkdir(exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            return generate.answer_prompts(
                self.out, rows, model, tokenizer, Sampling(**given)
            )

    def test_the_end_is_there_once_and_equal_answers_are_kept_once(self):
        eos = load_answering_model(self.model)[1].eos_token_id
        for line in self.answers(*self.biased([eos])):
            (one,) = line.responses
            self.assertEqual((one.tokens, one.finish), ([eos], "stop"))
            self.assertEqual(line.sampled, 4)

    def test_no_end_where_the_limit_came_first(self):
        for line in self.answers(*self.biased([5])):
            (one,) = line.responses
            self.assertEqual((one.tokens, one.finish), ([5] * 6, "length"))

    def test_memory_is_that_of_what_is_said(self):
        self.model = str(
            save_tiny_model(self.folder / "endless", max_position_embeddings=2**40)
        )
        model, tokenizer = self.biased(
            [load_answering_model(self.model)[1].eos_token_id]
        )
        mx.reset_peak_memory()
        self.answers(model, tokenizer, max_tokens=2 * 10**7)
        self.assertLess(mx.get_peak_memory(), 10**8)
        # Whatever is made at a time, what is drawn is as before.
        model, tokenizer = self.biased([*range(5, 60)])
        found = []
        for size in (generate.KEYS, 7, 3):
            shutil.rmtree(self.out)
            with mock.patch.object(generate, "KEYS", size):
                found.append(self.answers(model, tokenizer))
        self.assertEqual(found[0], found[1])
        drawn = {len({tuple(x.tokens) for x in one.responses}) for one in found[2]}
        self.assertEqual(drawn, {4})

    def test_prompts_edited_after_their_answers_are_told(self):
        rows = [
            {"id": i, "prompt": f"Say {w}.", "names": w} for i, w in enumerate(WORDS)
        ]
        prompts = self.write("a.jsonl", rows)
        self.collect(prompts)
        before = (self.out / "answers.jsonl").read_bytes()
        printed, _ = self.collect(prompts)
        self.assertNotIn("edited", printed)
        rows[3]["prompt"] = rows[4]["names"] = "more"
        printed, code = self.collect(self.write("a.jsonl", [*rows, {"prompt": "New."}]))
        self.assertEqual(code, 0, printed)
        self.assertIn(
            "[WARNING] 2 prompts edited after the answers, such as '3' (a.jsonl:4).",
            printed,
        )
        self.assertTrue((self.out / "answers.jsonl").read_bytes().startswith(before))
        self.assertEqual(len(read_answers(self.out)), 11)

    def test_dropout_is_off(self):
        model, tokenizer = load_answering_model(self.model)
        model.train()
        seen = []

        class Watched(type(model)):
            def __call__(self, *args, **kwargs):
                seen.append((self.training, kwargs.get("cache") is not None))
                return super().__call__(*args, **kwargs)

        model.__class__ = Watched
        self.answers(model, tokenizer)
        # In evaluation mode, with a cache; and as it was afterwards.
        self.assertEqual(set(seen), {(False, True)})
        self.assertTrue(model.training)

    def test_each_prompt_is_computed_once(self):
        model, tokenizer = load_answering_model(self.model)
        seen = []

        class Watched(type(model)):
            def __call__(self, tokens, *args, **kwargs):
                seen.append(tokens.shape)
                return super().__call__(tokens, *args, **kwargs)

        model.__class__ = Watched
        self.answers(model, tokenizer, samples=4)
        prefills = [shape for shape in seen if shape[1] > 1]
        self.assertEqual([shape[0] for shape in prefills], [1] * 4)

    def test_samples_do_not_depend_on_the_batch(self):
        # Per prompt and sample, whatever is computed beside: here to the last token.
        prompts = self.text()
        self.collect(prompts)
        self.collect(prompts, "--batch-size", "2", out=self.folder / "other")
        self.assertEqual(
            [[r.tokens for r in one.responses] for one in read_answers(self.out)],
            [
                [r.tokens for r in one.responses]
                for one in read_answers(self.folder / "other")
            ],
        )
        self.collect(prompts, "--seed", "1", out=self.folder / "seed")
        self.assertNotEqual(
            [one.responses for one in read_answers(self.out)],
            [one.responses for one in read_answers(self.folder / "seed")],
        )

    def test_a_killed_run_goes_on(self):
        prompts = self.text()
        self.collect(prompts, out=self.folder / "whole")
        whole = (self.folder / "whole/answers.jsonl").read_bytes()
        lines = whole.splitlines(keepends=True)
        self.out.mkdir()
        for cut in (0, len(lines[0]) // 2, len(whole) // 2, len(whole) - 1, len(whole)):
            with self.subTest(cut=cut):
                (self.out / "answers.jsonl").write_bytes(whole[:cut])
                printed, code = self.collect(prompts)
                self.assertEqual(code, 0, printed)
                found = (self.out / "answers.jsonl").read_bytes()
                self.assertEqual(found.splitlines(keepends=True)[:-1], lines[:-1])
                self.assertEqual(found.splitlines()[-1], lines[-1].strip())
        # What an editor leaves without the last end of a line is whole as well.
        (self.out / "answers.jsonl").write_bytes(whole[:-1])
        self.assertIn("Answered before: 10 of 10", self.collect(prompts)[0])
        self.collect(self.write("more.txt", "Say more.\n"))
        found = (self.out / "answers.jsonl").read_bytes()
        self.assertTrue(found.startswith(whole))
        self.assertEqual(found.count(b"\n"), 11)

    def test_another_model_is_refused_unless_said(self):
        self.collect(self.text(2))
        other = str(save_tiny_model(self.folder / "other", num_hidden_layers=2))
        prompts = self.text(4)
        before = (self.out / "answers.jsonl").read_bytes()
        for given, what in (
            ({"model": other}, "another model"),
            ({"more": ("--temperature", "0.5")}, "another sampling"),
            ({"more": ("--seed", "3")}, "another seed"),
        ):
            with self.subTest(what):
                printed, code = self.collect(
                    prompts, *given.get("more", ()), model=given.get("model")
                )
                self.assertEqual(code, 2)
                self.assertIn(what, printed)
                self.assertEqual((self.out / "answers.jsonl").read_bytes(), before)
        printed, code = self.collect(prompts, "--another-model", model=other)
        self.assertEqual(code, 0, printed)
        lines = read_answers(self.out)
        self.assertEqual([len({x.model for x in lines}), len(lines)], [2, 4])

    def test_what_happens_is_said_as_it_is(self):
        prompts = self.text(2)
        self.out.mkdir()
        with taken(self.out):
            printed, code = self.collect(prompts)
        self.assertEqual(code, 2)
        self.assertRegex(printed, rf"{self.out} is in use .* of its own with --output")
        # No fault of the folder.
        broken = mock.patch.object(
            generate, "_prefill", side_effect=RuntimeError("too large a buffer")
        )
        with broken, self.assertRaisesRegex(RuntimeError, "too large a buffer"):
            self.collect(prompts)
        # And what comes next.
        printed, code = self.collect(prompts)
        command = f"--label human --model {self.model} --output {self.out}\n"
        self.assertTrue(printed.endswith(f"\n  mlx_lm.dpo_collect {command}"), printed)

    def test_time_left(self):
        # Of 100 answers of 1 to 16 tokens, each ended with probability 1/8 a token.
        mean = (1 - (7 / 8) ** 16) * 8
        left = seconds_left(10.0, 400, 50, 100, 16)
        self.assertAlmostEqual(left, (100 * mean - 400) * 10 / 400)
        # None has ended: they may be as long as they may.
        self.assertEqual(seconds_left(5.0, 160, 0, 100, 16), 5 * 1440 / 160)
        self.assertIsNone(seconds_left(5.0, 40, 0, 100, 16))
        self.assertIsNone(seconds_left(5.0, 0, 0, 100, 16))
        # The first to end are the short ones: 4 of 32 after 8 tokens each.
        rng = np.random.default_rng(0)
        lengths = np.minimum(rng.geometric(0.02, 2000), 64)
        at = 8 * 2000 - np.maximum(8 - lengths, 0).sum()
        left = seconds_left(1.0, at, (lengths <= 8).sum(), 2000, 64)
        self.assertAlmostEqual(left, lengths.sum() / at - 1, delta=0.3)
        self.assertEqual(seconds_left(1.0, 1700, 100, 100, 16), 0)

    def test_prompts_that_are_too_long(self):
        prompts = self.write("p.txt", f"Say tea.\n{'hat ' * 200}\n")
        printed, code = self.collect(prompts)
        self.assertEqual(code, 0, printed)
        self.assertIn("too long for 128 positions", printed)
        self.assertEqual(len(read_answers(self.out)), 1)
        printed, code = self.collect(self.write("q.txt", "hat " * 200))
        self.assertEqual(code, 2, printed)

    def test_a_template_without_generation_prompt(self):
        folder = save_tiny_model(self.folder / "plain")
        for name in ("tokenizer_config.json", "chat_template.jinja"):
            path = folder / name
            if path.exists() and "add_generation_prompt" in (text := path.read_text()):
                path.write_text(text.replace("add_generation_prompt", "false"))
        printed, code = self.collect(self.text(2), model=str(folder))
        self.assertEqual(code, 0, printed)
        self.assertIn("no generation prompt", printed)

    def test_adapters(self):
        self.collect(self.text(3))
        printed, code = self.collect(
            self.text(3), "--adapter-path", str(self.folder / "none")
        )
        self.assertEqual(code, 2)
        self.assertIn("Can't load the adapter", printed)
        folder = self.folder / "adapter"
        folder.mkdir()
        for config in ("[]", "{", '{"num_layers": "x", "lora_parameters": {}}'):
            (folder / "adapter_config.json").write_text(config)
            printed, code = self.collect(self.text(3), "--adapter-path", str(folder))
            self.assertEqual(code, 2, printed)
            self.assertIn("Can't load the adapter", printed)

    def test_a_model_without_numbers_answers_nothing(self):
        model = self.folder / "broken"
        shutil.copytree(self.model, model)
        weights = str(model / "model.safetensors")
        broken = {k: v * float("nan") for k, v in mx.load(weights).items()}
        mx.save_safetensors(weights, broken, {"format": "mlx"})
        printed, code = self.collect(self.text(3), model=str(model))
        self.assertEqual(code, 2, printed)
        self.assertIn("The model's numbers are not finite", printed)
        self.assertFalse((self.out / "answers.jsonl").exists())

    def test_settings_get_one_line(self):
        prompts = self.text(2)
        for more, said in (
            (("--samples", "0"), "samples must be at least 1"),
            (("--top-p", "1.5"), "top_p must be"),
            (("--temperature", "0"), "all samples are equal"),
            (("--unknown",), "unrecognized"),
            (("--label", "odd"), "A judge is one of human, function"),
            (("--batch-size", "x"), "invalid int"),
        ):
            with self.subTest(more):
                printed, code = self.collect(prompts, *more)
                self.assertEqual(code, 2)
                self.assertIn(said, printed)
                # Before anything takes time.
                self.assertNotIn("Loading", printed)

    def test_greedy_is_what_generate_says(self):
        from mlx_lm.generate import generate_step

        self.collect(self.text(3), "--temperature", "0", "--samples", "1")
        model, tokenizer = load_answering_model(self.model)
        for line in read_answers(self.out):
            ids = PairTokenizer(tokenizer).prompt_ids(line.prompt, {})
            steps = generate_step(mx.array(ids), model, max_tokens=8)
            expected = []
            for token, _ in steps:
                expected.append(token)
                if token in tokenizer.eos_token_ids:
                    break
            self.assertEqual(line.responses[0].tokens, expected)


if __name__ == "__main__":
    unittest.main()
