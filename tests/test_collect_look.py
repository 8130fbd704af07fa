# Copyright © 2026 MLX Contributors

import time
import unittest

from browser import HAS_BROWSER, look
from page_server import answers, labels
from test_collect_page import CONTRASTS, PageTest, questions

from mlx_lm.preference.collect.labels import Label, append_label

if HAS_BROWSER:
    from selenium.webdriver.common.keys import Keys


class TestLook(PageTest):
    def test_contrast_and_width(self):
        long = "# A title\n\n" + "A long answer, `with code` and a [link](x). " * 20
        long += "\n\n> quoted\n\n| " + "wide | " * 30 + "\n|" + "---|" * 30
        rows = questions(2, long + "\n\n```\n" + "x" * 300 + "\n```", "y" * 300)
        append = lambda: append_label(self.folder, Label("q0", "reward", "tie"))
        url = self.open(*rows, *questions(1, "a", "b", "c", "d")[:0])
        append()
        for scheme in ("light", "dark"):
            for width in (390, 1280):
                look(self.driver, width, 844, scheme)
                self.driver.get(url)
                self.prompt("Q0")
                for act in (lambda: None, lambda: self.press("?"), self.edit):
                    act()
                    with self.subTest(scheme=scheme, width=width):
                        self.check_look(width)
                self.press(Keys.ESCAPE)
        for _ in range(2):
            self.press("t")
            time.sleep(0.3)
        self.wait_for("#end h2")
        for scheme in ("light", "dark"):
            look(self.driver, 390, 844, scheme)
            self.check_look(390)

    def edit(self):
        self.press(Keys.ESCAPE)
        self.press("e")
        self.press("1")
        self.wait_for("textarea")

    def check_look(self, width):
        found = self.driver.execute_script(CONTRASTS)
        self.assertGreater(len(found), 10)
        self.assertEqual([one for one in found if one[0] < 4.5], [])
        wide = "return document.documentElement.scrollWidth"
        self.assertLessEqual(self.driver.execute_script(wide), width)

    def test_order_of_focus_and_names(self):
        self.open(*questions(2))
        names = []
        for _ in range(12):
            self.press(Keys.TAB)
            names.append(
                self.driver.execute_script(
                    "const e = document.activeElement;"
                    "return e.ariaLabel || e.textContent"
                )
            )
        wanted = ["To the answers", "Help and keys"]
        for i in (1, 2):
            wanted.append(f"Answer {i}: this one is better")
            wanted.append(f"Edit answer {i}: your version becomes the chosen one")
        wanted += ["Answer 11", "Tiet", "Both badb", "Answer 22", "Skips"]
        self.assertEqual(names[: len(wanted)], wanted)
        bar = self.find("#progress")
        self.assertEqual(bar.get_attribute("aria-valuemax"), "2")
        self.press("t")
        self.prompt("Q1")
        self.assertEqual(bar.get_attribute("aria-valuenow"), "1")
        self.assertEqual(self.said(), "Saved: equally good")
        # The same button of the next pair has the focus of the one before.
        self.all("#answers .edit")[1].send_keys(Keys.NULL)

    def test_reduced_motion(self):
        self.open(*questions(2))
        of_bar = "return getComputedStyle(document.querySelector('#progress div'))"
        of_bar += ".transitionDuration"
        self.assertEqual(self.driver.execute_script(of_bar), "0s")
        look(self.driver, motion="no-preference")
        self.assertNotEqual(self.driver.execute_script(of_bar), "0s")

    def test_ten_thousand_rows(self):
        text = "A sentence of an answer that is neither short nor long. " * 20
        rows = [answers(f"q{i}", "good" + text, "poor" + text) for i in range(10_000)]
        for row in rows:
            row["responses"][0]["tokens"] = list(range(250))
        self.open(*rows)
        tic = time.monotonic()
        self.driver.refresh()
        self.wait_for("#prompt .turn")
        # The figures are in benchmarks/README.md; here other tests run beside.
        self.assertLess(time.monotonic() - tic, 10)
        for i in range(10):
            self.press("t")
            self.wait(lambda n=i: f"{n + 1} of" in self.find("header").text)
        self.assertEqual(len(labels(self.folder)), 10)


del PageTest


if __name__ == "__main__":
    unittest.main()
