# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import math
import re
import shlex
import sys
import tempfile
import unittest
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

from folders import FolderCase
from test_inspection import scored
from tiny import HAS_MATPLOTLIB, Pairs, pair

from mlx_lm.dpo import resolve_args
from mlx_lm.preference.files import json_text
from mlx_lm.preference.report import page as report
from mlx_lm.preference.report.charts import (
    PAPER,
    Chart,
    Series,
    curves,
    draw_curves,
    draw_histogram,
    draw_reliability,
    svg,
    write_png,
)
from mlx_lm.preference.report.inspect import LONGEST, pick_pairs, save_pairs
from mlx_lm.preference.report.page import render, write_report
from mlx_lm.preference.run.folder import run_versions, saved_settings
from mlx_lm.preference.run.reading import read_json
from mlx_lm.preference.settings.checks import check_args
from mlx_lm.preference.watch.retained_text import RetainedText
from mlx_lm.preference.watch.trackers import check_matplotlib

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=y>{{ 7 * 7 }}$x$"


def training(it, **more):
    return {"iteration": it, "loss": 0.7 - it / 100, "rewards/chosen": it / 10, **more}


REPORTS = [
    {"iteration": 0, "val_loss": 0.7, "val_rewards/accuracies": 0.0},
    training(5),
    training(10, grad_norm=float("nan")),
    {"iteration": 10, "val_loss": 0.6, "val_rewards/accuracies": 0.75},
]


class Page(HTMLParser):
    """The tags, attributes and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


class TestPairs(unittest.TestCase):
    def test_the_surest_of_each_kind(self):
        pairs = Pairs(pair([i], [i + 1], [i + 2] * 3) for i in range(30))
        pairs.tokenizer = mock.Mock(decode=lambda ids: "-".join(map(str, ids)))
        margins = [i - 24.0 for i in range(30)]
        margins[29] = float("nan")
        got = pick_pairs(pairs, scored(margins))
        self.assertEqual([p["pair"] for p in got if p["right"]], [28, 27, 26, 25])
        wrong = [p["pair"] for p in got if not p["right"]]
        # A margin of 0 is not right, and there are ten at most.
        self.assertEqual(wrong, list(range(10)))
        self.assertEqual(got[0]["rejected"], "30-30-30")
        self.assertEqual(got[0]["margin"], 4.0)
        # Of a sample, the place in the whole set is told.
        (row,) = pick_pairs(pairs, scored(margins).select([28]))
        self.assertEqual((row["pair"], row["prompt"]), (28, "28"))

    def test_long_texts_lose_their_middle(self):
        pairs = Pairs([pair([1], [2], [3])])
        pairs.tokenizer = mock.Mock(decode=lambda ids: "a" * LONGEST + "b" * LONGEST)
        text = pick_pairs(pairs, scored([1.0]))[0]["prompt"]
        self.assertLess(len(text), LONGEST + 10)
        self.assertTrue(text.startswith("aaa") and text.endswith("bbb"))

    def test_kept_in_a_file(self):
        with tempfile.TemporaryDirectory() as folder:
            save_pairs(folder, [{"prompt": "ä"}], [0.123456], [1.0])
            self.assertEqual(
                read_json(Path(folder) / "test_pairs.json"),
                {"before": [0.1235], "after": [1.0], "pairs": [{"prompt": "ä"}]},
            )


class TestCurves(unittest.TestCase):
    def test_series(self):
        charts = {chart.title: chart for chart in curves(REPORTS)}
        self.assertEqual(
            list(charts), ["Loss", "Reward accuracy", "Rewards", "Gradient norm"]
        )
        train, val = charts["Loss"].series
        self.assertEqual((train.x, val.x, val.y), ([5, 10], [0, 10], [0.7, 0.6]))
        self.assertTrue(val.held_out and not train.held_out)
        (accuracy,) = charts["Reward accuracy"].series
        self.assertEqual(accuracy.y, [0.0, 75.0])
        (chosen,) = charts["Rewards"].series
        self.assertEqual((chosen.name, chosen.y), ("chosen", [0.5, 1.0]))
        self.assertEqual(curves([]), [])


@unittest.skipUnless(HAS_MATPLOTLIB, "needs matplotlib")
class TestPictures(unittest.TestCase):
    def test_svg_takes_its_colours_from_the_page(self):
        chart = Chart("t", "u", [Series("<b>", [1, 2], [3, 4], "two")])
        chart.series.append(Series("val", [1], [3], held_out=True))
        pictures = [
            svg(lambda axes, colors: draw_curves(axes, colors, chart), name)
            for name in ("a", "b", "a")
        ]
        first, other, again = pictures
        self.assertEqual(first, again)
        self.assertTrue(first.startswith("<svg") and first.endswith("</svg>\n"))
        self.assertIn("&lt;b&gt;", first)
        self.assertNotIn("<b>", first)
        used = set(re.findall(r"var\(--(\w+)\)", first))
        self.assertEqual(used, set(PAPER))
        self.assertEqual(set(re.findall(r"#[0-9a-f]{6}\b", first)), set())
        ids = [set(re.findall(r' id="([^"]*)"', x)) for x in (first, other)]
        self.assertFalse(ids[0] & ids[1])
        for target in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', first):
            self.assertIn("".join(target), ids[0])

    def test_histogram_and_reliability(self):
        before, after = [0.0] * 5 + [float("nan")], [1.0, -2.0, 1000.0]
        picture = svg(lambda a, c: draw_histogram(a, c, before, after), "h")
        self.assertIn(">before<", picture)
        svg(lambda a, c: draw_histogram(a, c, [], []), "h")
        bins = [0.55, None, 0.9], [0.2, None, 1.0]
        picture = svg(lambda a, c: draw_reliability(a, c, *bins), "r")
        self.assertIn(">policy<", picture)
        svg(lambda a, c: draw_reliability(a, c, [None], [None]), "r")

    def test_png(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "curves.png"
            write_png(curves(REPORTS), path, EVIL)
            self.assertEqual(path.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")
            write_png(curves(REPORTS)[:1], path, "one")


class TestReport(FolderCase):
    def write(self, name, content):
        text = content if isinstance(content, str) else json.dumps(content)
        (self.folder / name).write_text(text)

    def write_run(self):
        lines = "".join(json.dumps(x) + "\n" for x in REPORTS)
        self.write("metrics.jsonl", lines + '{"iteration": 15, "lo')
        args = resolve_args(["--model", f"a/{EVIL}", "--data", EVIL])
        config = saved_settings(vars(args))
        config |= {"project_name": EVIL, "loss_type": ["sigmoid", "sft"]}
        self.write("adapter_config.json", config)
        samples = [
            {
                **{"iteration": it, "prompt": p, "answer": f"at {it}: {EVIL}"},
                "reference": f"another: {EVIL}",
            }
            for it in (0, 5, 10)
            for p in (EVIL, [{"role": "user", "content": EVIL}])
        ]
        self.write("samples.jsonl", "".join(json.dumps(x) + "\n" for x in samples))
        text = {"file": EVIL, "tokens": 9000, "before": 10.0, "after": 9.0}
        self.write("retained_text.json", text | {"change": -0.1})
        metrics = {"pairs": 2.0, "rewards/accuracies": 0.5, "kl": None}
        metrics["calibration/confidence"] = metrics["calibration/accuracy"] = [0.5]
        metrics |= {"test/data": EVIL, "test/max_seq_length": 1024}
        self.write("test_metrics.json", metrics)
        texts = dict.fromkeys(("prompt", "chosen", "rejected"), EVIL)
        pairs = [
            {"pair": i, **texts, "margin": m, "right": m > 0}
            for i, m in enumerate((0.5, -0.25))
        ]
        save_pairs(self.folder, pairs, [0.0, 0.0], [1.0, -1.0])
        look = json.dumps({"id": f"id {EVIL}", "why": f"why {EVIL}"})
        self.write("review.jsonl", f"{look}\n")

    @unittest.skipUnless(HAS_MATPLOTLIB, "needs matplotlib")
    def test_everything_is_there_and_escaped(self):
        self.write_run()
        path = write_report(self.folder)
        text = path.read_text("utf-8")
        page = Page(text)
        self.assertFalse({"script", "img", "link", "iframe"} & set(page.tags))
        for name, value in page.attributes:
            self.assertFalse(name.startswith("on"), name)
            if name in ("src", "href", "xlink:href"):
                self.assertTrue(value.startswith("#"), value)
        self.assertNotRegex(text, r"@import|url\((?!#)")
        self.assertNotIn("49$x$", page.text)
        visible = (
            "another:",
            "at 0:",
            "at 10:",
            "sigmoid + sft · beta",
            "2 between",
            "10.00 before, 9.00 after (-10.0 %), 9,000 tokens",
            f"2 pairs of {EVIL}, at most 1,024 tokens long.",
            "reward accuracy",
            "50.0%",
            "A wrong pair",
            "A right pair",
            "-0.250",
            "Labels that may be wrong",
            f"--output {shlex.quote(EVIL)} --review {self.folder}",
            f"id {EVIL}",
            f"why {EVIL}",
            "Settings",
            "batch_size",
            "Versions",
            run_versions()["mlx"],
        )
        for wanted in visible:
            self.assertIn(wanted, page.text)
        for shown in ("prefers-color-scheme: dark", "@media print"):
            self.assertIn(shown, text)
        # Prompts, answers, settings, pairs: all show the text as it is.
        self.assertGreaterEqual(page.text.count(EVIL), 15)
        self.assertEqual(page.tags.count("svg"), len(curves(REPORTS)) + 2)
        self.assertTrue((self.folder / "curves.png").exists())
        self.assertEqual(write_report(self.folder).read_text("utf-8"), text)

    @unittest.skipUnless(HAS_MATPLOTLIB, "needs matplotlib")
    def test_a_run_whose_numbers_were_lost(self):
        self.write_run()
        nothing = json.loads(json_text({k: math.nan for k in REPORTS[-1]}))
        nothing |= {f"val_{k}": None for k in nothing} | {"iteration": 15}
        lines = [*REPORTS, nothing]
        self.write("metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
        RetainedText("a", 9, math.inf, 2.0).save(self.folder)
        save_pairs(self.folder, [], [0.0, math.nan], [1.0, math.inf])
        text = write_report(self.folder).read_text("utf-8")
        self.assertIn("2.00 before, inf after (+inf %)", Page(text).text)

    @unittest.skipUnless(HAS_MATPLOTLIB, "needs matplotlib")
    def test_another_model_is_not_called_before(self):
        self.write_run()
        (self.folder / "samples.jsonl").unlink()
        for model, name in (("m", "reference"), (None, "before")):
            text = render(self.folder, "t", {"reference_model": model}, [], [])
            # The table and the histogram's legend.
            shown = re.findall(r">(before|reference)<", text)
            self.assertEqual(shown, [name, name])

    @unittest.skipUnless(HAS_MATPLOTLIB, "needs matplotlib")
    def test_a_run_that_has_only_begun(self):
        self.write("metrics.jsonl", "")
        text = write_report(self.folder).read_text("utf-8")
        self.assertNotIn("<h2>Test", text)
        self.assertNotIn("<svg", text)
        self.assertFalse((self.folder / "curves.png").exists())
        self.assertIn("&lt;b&gt;", render(self.folder, "<b>", {}, [], []))

    @unittest.skipUnless(HAS_MATPLOTLIB, "needs matplotlib")
    def test_command(self):
        self.write_run()
        out, err = io.StringIO(), io.StringIO()
        with mock.patch.object(sys, "argv", ["report", str(self.folder), "nowhere"]):
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                with self.assertRaises(SystemExit) as caught:
                    report.main()
        self.assertEqual(caught.exception.code, 2)
        self.assertEqual(out.getvalue(), f"Wrote {self.folder / 'report.html'}\n")
        # Matplotlib may have something to say before it.
        line = err.getvalue().splitlines()[-1]
        self.assertRegex(line, r"^Error: nowhere has no metrics.jsonl")

    def test_without_matplotlib(self):
        with mock.patch("importlib.util.find_spec", return_value=None):
            message = "report needs matplotlib: pip install matplotlib"
            with self.assertRaisesRegex(ValueError, message):
                check_matplotlib()
            with self.assertRaisesRegex(ValueError, message):
                check_args(resolve_args(["--train", "--data", "d", "--report"]))
            self.write("metrics.jsonl", "")
            with self.assertRaisesRegex(ValueError, message):
                write_report(self.folder)


if __name__ == "__main__":
    unittest.main()
