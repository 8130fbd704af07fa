# Copyright © 2026 MLX Contributors

import contextlib
import os
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

from browser import HAS_BROWSER, WHY_NOT, look, open_browser
from page_server import COMMANDS, answers, labels, process, serving, write_answers
from test_collect_server import call, choose

from mlx_lm.preference.collect.labels import Label, append_label

if HAS_BROWSER:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

EVIL = [
    "<script>window.hacked = 1</script>",
    "<svg onload='window.hacked = 1'><animate onbegin=window.hacked=1>",
    "<img src=x onerror='window.hacked = 1'>",
    "[click](javascript:window.hacked=1) ![x](data:image/svg+xml,<svg/onload=hacked=1>)",
    "<a href='data:text/html,<script>1</script>'>x</a> <iframe srcdoc='<p>'></iframe>",
    "`</code><script>window.hacked=1</script>`",
    "```html\n</pre><script>window.hacked=1</script>\n```",
    "| <b>a</b> | b |\n|---|---|\n| <script>window.hacked=1</script> | x |",
    "</textarea></style></main><style>*{display:none}</style>",
    "&lt;b&gt; &amp; {{ 7 * 7 }} ${7*7}",
]
# What is written out, and as what.
OBEYED = {
    "\x1b[31mred\x1b[0m": "U+001B[31mredU+001B[0m",
    "safe \u202efdp.exe": "safe U+202Efdp.exe",
    "zero\u200bwidth\ufeff": "zeroU+200BwidthU+FEFF",
    "null\x00 bell\x07": "nullU+0000 bellU+0007",
    "tag\U000e0041": "tagU+E0041",
    "half \ud800 pair": "half U+D800 pair",
}
# Seconds become hundredths, requests are counted, and the beats of the page's clock.
FASTER = """
const later = setTimeout, ask = fetch;
window.asked = window.beats = 0;
window.setTimeout = (act, ms) => later(() => { if (act.name === "pulse") beats++; act(); }, ms / 20);
window.fetch = (...what) => { asked++; return ask(...what); };
"""
# Colours of all texts and of what lies under them, as WCAG 2.2 compares them.
CONTRASTS = """
const rgb = (c) => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
const light = (c) => c.slice(0, 3).map((x) => x / 255).map((x) => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
const under = (e) => !e ? [255, 255, 255, 1] : over(rgb(getComputedStyle(e).backgroundColor), rgb(getComputedStyle(e).backgroundColor)[3] === 1 ? [0, 0, 0, 1] : under(e.parentElement));
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
for (let node; node = walker.nextNode();) {
  const e = node.parentElement, style = getComputedStyle(e);
  if (!node.data.trim() || !e.checkVisibility({ opacityProperty: true }) || e.closest("button:disabled, script, style, noscript")) continue;
  const ground = under(e), a = light(over(rgb(style.color), ground)), b = light(ground);
  found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.data.trim().slice(0, 40), e.className]);
}
return found;
"""


@unittest.skipUnless(HAS_BROWSER, WHY_NOT)
class PageTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.driver = open_browser()
        cls.addClassCleanup(cls.driver.quit)

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory())) / "pairs"
        cache = self.enterContext(tempfile.TemporaryDirectory())
        self.enterContext(mock.patch.dict(os.environ, {"XDG_CACHE_HOME": cache}))
        self.cache = cache
        look(self.driver)
        self.driver.get_log("browser")

    def open(self, *rows, **more):
        """Serve rows and open the page."""
        write_answers(self.folder, rows)
        _, url = self.enterContext(serving(self.folder, **more))
        self.driver.get(url)
        self.wait_for("#prompt .turn, #end h2")
        return url

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition, seconds=20, what="what was waited for"):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # What is drawn anew meanwhile is looked up anew.
            with contextlib.suppress(StaleElementReferenceException):
                if found := condition():
                    return found
            time.sleep(0.02)
        self.fail(f"Never came: {what}. The page: {self.find('body').text[:600]}")

    def wait_for(self, selector):
        shown = lambda: any(x.is_displayed() for x in self.all(selector))
        return self.wait(shown, what=selector)

    def press(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def chord(self, held, key):
        acts = ActionChains(self.driver).key_down(held).send_keys(key)
        acts.key_up(held).perform()

    def prompt(self, text):
        """Wait until a prompt is shown."""
        self.wait(lambda: self.find("#prompt").text.endswith(text), what=text)

    def said(self):
        return self.find("#live").get_attribute("textContent")

    def card(self, text):
        """The number on screen of the answer with a text."""
        cards = [card.find_element(By.CSS_SELECTOR, ".body") for card in self.cards()]
        return next(i for i, card in enumerate(cards) if card.text.startswith(text))

    def cards(self):
        return self.all("#answers .card")

    def errors(self):
        return [x for x in self.driver.get_log("browser") if x["level"] == "SEVERE"]


def questions(count, *texts):
    texts = texts or ("good", "poor")
    return [answers(f"q{i}", *texts, prompt=f"Q{i}") for i in range(count)]


class TestVotes(PageTest):
    def test_by_key_and_by_click(self):
        self.open(*questions(9))
        acts = [
            ("ranking", lambda: self.press(str(self.card("good") + 1))),
            ("ranking", lambda: self.press(self.arrow("good"))),
            ("ranking", lambda: self.choose_button("good").click()),
            ("ranking", lambda: self.footer_button("good").click()),
            ("tie", lambda: self.press("t")),
            ("bad", lambda: self.press("b")),
            ("none", lambda: self.press("s")),
            ("tie", lambda: self.find("[data-do=tie]").click()),
            ("ranking", lambda: self.focus_and_press(Keys.ENTER)),
        ]
        for number, (verdict, act) in enumerate(acts):
            with self.subTest(number=number):
                self.prompt(f"Q{number}")
                act()
                self.wait(lambda n=number: self.votes() > n, what="a line")
                line = labels(self.folder)[-1]
                self.assertEqual((line["id"], line["verdict"]), (f"q{number}", verdict))
                if verdict == "ranking":
                    self.assertEqual(line["ranking"], [[0], [1]])
        self.wait_for("#end h2")
        self.assertIn("All 9 prompts are judged", self.find("#end").text)
        self.assertIn(COMMANDS["train"], self.find("#end").text)
        self.wait(lambda: "5 pairs in the folder" in self.find("#end").text)
        self.assertEqual(self.errors(), [])
        self.press("s")
        self.prompt("Q6")

    def votes(self):
        path = self.folder / "labels.jsonl"
        return len(labels(self.folder)) if path.exists() else 0

    def arrow(self, text):
        return (Keys.ARROW_LEFT, Keys.ARROW_RIGHT)[self.card(text)]

    def choose_button(self, text):
        return self.all("#answers .choose")[self.card(text)]

    def footer_button(self, text):
        return self.find(f"[data-do='choose {self.card(text)}']")

    def focus_and_press(self, key):
        self.driver.execute_script("arguments[0].focus()", self.choose_button("good"))
        self.press(key)

    def test_undo_also_after_a_reload(self):
        self.open(*questions(3))
        self.press("t")
        self.prompt("Q1")
        self.press("b")
        self.prompt("Q2")
        self.driver.refresh()
        self.prompt("Q2")
        self.assertIn("2 of 3", self.find("header").text)
        self.press("u")
        self.prompt("Q1")
        self.find("[data-do=undo]").click()
        self.prompt("Q0")
        self.assertIn("0 of 3", self.find("header").text)
        self.assertTrue(self.find("[data-do=undo]").get_property("disabled"))

    def test_keys_that_are_not_the_pages(self):
        self.open(*questions(2))
        self.chord(Keys.CONTROL, "t")
        self.chord(Keys.ALT, "1")
        self.press("3", "x")
        self.press("?")
        self.wait_for("#help")
        self.press("t")
        self.press(Keys.ESCAPE)
        time.sleep(0.2)
        self.assertEqual(self.votes(), 0)
        self.prompt("Q0")

    def test_an_edited_answer_is_the_chosen_one(self):
        url = self.open(*questions(2))
        number = self.card("poor")
        self.press("e")
        self.press(str(number + 1))
        self.wait_for("textarea")
        # Keys are letters there.
        self.press("t1 ")
        self.driver.get(url)
        self.prompt("Q0")
        self.all("#answers .edit")[number].click()
        area = self.find("textarea")
        self.assertEqual(area.get_property("value"), "t1 poor")
        self.press(Keys.ESCAPE)
        self.assertEqual(self.all("textarea"), [])
        self.all("#answers .edit")[number].click()
        self.chord(Keys.CONTROL, Keys.ENTER)
        self.prompt("Q1")
        (line,) = labels(self.folder)
        self.assertEqual(line["edited"], {"response": 1, "text": "t1 poor"})
        self.assertEqual(line["ranking"], [[1], [0]])
        # Taken back, what was written is offered again.
        self.press("u")
        self.prompt("Q0")
        self.all("#answers .edit")[number].click()
        self.assertEqual(self.find("textarea").get_property("value"), "t1 poor")
        # Another judge's labels are no reason to draw anything anew.
        append_label(self.folder, Label("q1", "reward", "tie"))
        self.find("textarea").send_keys("x")
        self.driver.execute_script("dispatchEvent(new Event('focus'))")
        time.sleep(0.5)
        self.assertIn("x", self.find("textarea").get_property("value"))
        self.find("textarea").clear()
        self.find(".saving .first").click()
        self.assertIn("empty", self.said())

    def test_places_of_more_than_two(self):
        self.open(*questions(4, "one", "two", "three", "four"))
        key = lambda text: str(self.card(text) + 1)
        self.press(key("three"))
        self.press(key("one"))
        self.assertEqual(len(self.all(".card .place")), 2)
        self.press(Keys.ENTER)
        self.prompt("Q1")
        self.assertEqual(labels(self.folder)[-1]["ranking"][:2], [[2], [0]])
        self.assertEqual(sorted(labels(self.folder)[-1]["ranking"][2]), [1, 3])
        self.press(Keys.ENTER)  # Nothing has a place.
        self.assertIn("Press a number", self.said())
        self.press(key("four"))
        self.chord(Keys.SHIFT, key("two"))
        self.press(key("one"))
        self.press(Keys.BACKSPACE)
        self.press(key("three"))
        self.find("[data-do=save]").click()
        self.prompt("Q2")
        self.assertEqual(labels(self.folder)[-1]["ranking"], [[3, 1], [2], [0]])
        # By drag: the last chip to the front, then the second to the front.
        for _ in range(2):
            chips = self.all(".chip")
            ActionChains(self.driver).click_and_hold(chips[3]).move_by_offset(
                -20, 0
            ).move_to_element_with_offset(
                chips[0], -chips[0].size["width"] // 2 + 2, 0
            ).release().perform()
        # The last chip was answer 4, then answer 3: they are the best now.
        shown = labels_shown(self)
        self.press(Keys.ENTER)
        self.prompt("Q3")
        line = labels(self.folder)[-1]
        self.assertEqual(line["ranking"][:2], [[shown[2]], [shown[3]]])
        # A chip that is clicked goes to the next place, and comes back.
        self.all(".chip")[1].click()
        self.all(".chip")[0].click()
        self.assertEqual(self.all(".card .place"), [])
        self.press("b")
        self.wait_for("#end h2")

    def test_the_second_look(self):
        write_answers(self.folder, questions(2))
        append_label(
            self.folder, Label("q1", "reward", "scores", scores=[2.0, 1.0], certainty=1)
        )
        look_again = {"again": {(0, "q1"): "judges disagree"}, "mark": "review 1"}
        self.open(*questions(2), **look_again)
        self.prompt("Q1")
        self.assertFalse(self.find("#before").is_displayed())
        self.press(str(self.card("poor") + 1))
        self.wait_for("#before")
        better, worse = self.card("good") + 1, self.card("poor") + 1
        self.assertIn(f"{better} > {worse} (2, 1)", self.find("#before").text)
        self.assertIn("reward", self.find("#before").text)
        self.assertIn("another order", self.find("#before").text)
        self.assertIn("because judges disagree.", self.find("#before").text)
        # Also with the text as it is.
        for _ in range(2):
            self.press("m")
            self.assertTrue(self.find("#before").is_displayed())
            (best,) = self.all(".card.best .body")
            self.assertEqual(best.text, "poor")
        self.press("u")
        self.wait(lambda: not self.find("#before").is_displayed())
        self.press(str(self.card("good") + 1))
        self.wait(lambda: "the same" in self.find("#before").text)
        self.press(Keys.ENTER)
        self.wait_for("#end h2")


def labels_shown(test):
    """The response numbers in the order on screen."""
    texts = [card.text for card in test.all("#answers .card .body")]
    return [("one", "two", "three", "four").index(text) for text in texts]


class TestNothingIsLost(PageTest):
    def test_two_tabs(self):
        url = self.open(*questions(4))
        first = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        self.addCleanup(self.driver.switch_to.window, first)
        self.addCleanup(self.driver.close)
        self.driver.get(url)
        self.prompt("Q0")
        self.press("t")
        self.prompt("Q1")
        self.driver.switch_to.window(first)
        self.prompt("Q1")
        # Judged elsewhere, and the page does not know it yet.
        call(url, "vote", choose(call(url)[1]["item"], "good"))
        self.press("b")
        self.prompt("Q2")
        self.driver.switch_to.window(self.driver.window_handles[-1])
        said = [(one["id"], one["verdict"]) for one in labels(self.folder)]
        self.assertEqual(said, [("q0", "tie"), ("q1", "ranking")])

    def test_a_killed_server(self):
        write_answers(self.folder, questions(4))
        with process(self.folder, cache=self.cache) as (running, url):
            self.driver.get(url)
            self.prompt("Q0")
            self.press("t")
            self.prompt("Q1")
            running.kill()
            running.wait()
            # Said before anything is pressed.
            self.wait_for("#notice")
            self.assertIn("--label human:anna", self.find("#notice").text)
            self.assertIn("All your choices are on the disk", self.find("#notice").text)
            self.press("b")
            self.wait(lambda: self.find("[data-do=tie]").get_property("disabled"))
            self.prompt("Q1")
            self.assertIn("Your last choice is kept here", self.find("#notice").text)
            self.assertEqual(len(labels(self.folder)), 1)
            # What fails is tried again once a second, not ever more often.
            self.driver.execute_script(FASTER)
            time.sleep(2)
            asked, beats = self.driver.execute_script("return [asked, beats]")
            self.assertGreater(asked, 4)
            self.assertLessEqual(asked, beats + 1)
        with process(self.folder, urlsplit(url).port, cache=self.cache):
            self.prompt("Q2")
            self.assertFalse(self.find("#notice").is_displayed())
            said = [(one["id"], one["verdict"]) for one in labels(self.folder)]
            self.assertEqual(said, [("q0", "tie"), ("q1", "bad")])
            self.press("t")
            self.prompt("Q3")

    def test_an_answer_lost_on_its_way(self):
        from mlx_lm.preference.collect.server import Handler

        self.open(*questions(3))
        send, lost = Handler._send, []

        def lose(handler, *content):
            if handler.command == "POST" and not lost:
                lost.append(1)
                return handler.connection.close()
            return send(handler, *content)

        with mock.patch.object(Handler, "_send", lose):
            self.press("t")
            self.prompt("Q1")
        self.assertEqual(len(lost), 1)
        self.assertEqual(len(labels(self.folder)), 1)

    def test_labels_that_became_shorter(self):
        self.open(*questions(2))
        self.press("t")
        self.prompt("Q1")
        (self.folder / "labels.jsonl").write_text("")
        self.wait_for("#notice")
        self.assertIn("became shorter", self.find("#notice").text)
        self.assertNotIn("address", self.find("#notice").text)

    def test_a_full_disk(self):
        self.open(*questions(2))
        full = mock.patch("os.fsync", side_effect=OSError(28, "No space left"))
        with full:
            self.press("t")
            self.wait_for("#notice")
            self.assertIn("No space left", self.find("#notice").text)
            self.prompt("Q0")
        self.prompt("Q1")
        self.assertFalse(self.find("#notice").is_displayed())


class TestText(PageTest):
    def test_hostile_text_is_text(self):
        self.open(
            answers(
                "<b>",
                "\n\n".join(EVIL),
                "\n\n".join(OBEYED),
                prompt=EVIL[0],
                row={EVIL[1]: EVIL[2]},
            )
        )
        markup = self.driver.execute_script(
            "return [...document.querySelectorAll('main *')].map(x => x.tagName)"
        )
        for tag in ("SCRIPT", "SVG", "svg", "IMG", "A", "IFRAME", "B", "STYLE"):
            self.assertNotIn(tag, markup)
        self.assertIsNone(self.driver.execute_script("return window.hacked ?? null"))
        self.assertEqual(self.find("#prompt").text, EVIL[0])
        evil, obeyed = (
            self.cards()[i].find_element(By.CSS_SELECTOR, ".body").text
            for i in (self.card("<script>"), 1 - self.card("<script>"))
        )
        for part in (EVIL[0], EVIL[1], EVIL[2], EVIL[4], EVIL[8], EVIL[9]):
            self.assertIn(part, evil)
        self.assertIn("click (javascript:window.hacked=1)", evil)
        for text in OBEYED.values():
            self.assertIn(text, obeyed)
        self.press("m")
        evil = self.cards()[self.card("<script>")].text
        for part in EVIL:
            self.assertIn(part, evil)
        self.press("e")
        self.press(str(self.card("<script>") + 1))
        value = self.find("textarea").get_property("value")
        self.assertEqual(value, "\n\n".join(EVIL))
        self.assertEqual(self.errors(), [])

    def test_markdown(self):
        table = "| a | b |\n|:--|--:|\n| 1 | **2** |"
        text = (
            "# Title\n\nSome **bold**, *slanted*, `code` and snake_case_name 2 * 3 * 4\n"
            "next line\n\n- one\n  - inner\n3. three\n\n> quoted\n\n"
            + table
            + "\n\n---\n"
            "```py\nx = '**no**'\n```\n**unclosed and `open"
        )
        self.open(answers("q", text, "plain"))
        body = self.cards()[self.card("Title")]
        inside = lambda css: [x.text for x in body.find_elements(By.CSS_SELECTOR, css)]
        self.assertEqual(inside(".h1"), ["Title"])
        self.assertEqual(inside("strong"), ["bold", "2"])
        self.assertEqual(inside("em"), ["slanted"])
        self.assertEqual(inside("p > code"), ["code"])
        self.assertEqual(inside("li .mark"), ["•", "•", "3."])
        self.assertEqual(inside("blockquote"), ["quoted"])
        self.assertEqual(inside("td"), ["1", "2"])
        self.assertEqual(inside("pre"), ["x = '**no**'"])
        self.assertEqual(len(inside("hr")), 1)
        self.assertIn("snake_case_name 2 * 3 * 4\nnext line", body.text)
        self.assertIn("**unclosed and `open", body.text)

    def test_long_and_ugly_text_takes_no_time(self):
        marks = ["`" * i + " " for i in range(1, 150)]
        ugly = ["[" * 20000, "*a " * 20000, "_" * 50000, "".join(marks), "> " * 20000]
        ugly += ["|" * 30000 + "\n|-|\n" + "|" * 30000, "- " * 30000, "x" * 10**6]
        self.open(*(answers(f"q{i}", text, "ok") for i, text in enumerate(ugly)))
        for i in range(len(ugly)):
            with self.subTest(text=ugly[i][:8]):
                tic = time.monotonic()
                self.press("t")
                self.wait(lambda n=i: f"{n + 1} of" in self.find("header").text)
                self.assertLess(time.monotonic() - tic, 5)
        self.assertEqual(self.errors(), [])

    def test_other_contents(self):
        row = answers("q", "", " \n", "x")
        parts = [{"type": "text", "text": "in parts"}]
        row["prompt"] = [
            {"role": "system", "content": "Be brief."},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
            {"role": "user", "content": parts},
        ]
        row["responses"][2]["finish"] = "length"
        text = answers("r", "a", "b")
        text["prompt"] = "Once upon a time"
        self.open(row, text)
        self.prompt("in parts")
        self.assertIn("tool_calls", self.find("#prompt").text)
        for words in ("an empty answer", "only white space", "Cut off here"):
            self.assertIn(words, self.find("#answers").text)
        self.press("b")
        self.prompt("Once upon a time")


if __name__ == "__main__":
    unittest.main()
