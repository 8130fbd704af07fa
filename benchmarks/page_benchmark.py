# Copyright © 2026 MLX Contributors

"""How fast the page of mlx_lm.dpo_collect is in a real browser, and how it looks.

python benchmarks/page_benchmark.py --screenshots mlx_lm/examples
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from browser import HAS_BROWSER, WHY_NOT, look, open_browser  # noqa: E402
from page_server import answers, labels, process, write_answers  # noqa: E402

from mlx_lm.preference.collect.labels import Label, append_label  # noqa: E402

PAIRS = ROOT / "mlx_lm" / "examples" / "preferences" / "train.jsonl"
SENTENCE = "This is one of the sentences of an answer of **ordinary** length. "
# From a key to the next question on screen, in ms.
VOTE = """
const done = arguments[0], prompt = document.getElementById("prompt"), from = performance.now();
new MutationObserver((_, observer) => {
  observer.disconnect();
  requestAnimationFrame(() => done(performance.now() - from));
}).observe(prompt, { childList: true });
document.dispatchEvent(new KeyboardEvent("keydown", { key: "1", code: "Digit1" }));
"""
OPENED = "return document.querySelector('#prompt .turn') !== null"
# From the request to the first question on screen, in ms.
OPEN = """
const done = arguments[0];
requestAnimationFrame(() => done(performance.getEntriesByName("shown")[0]?.startTime ?? performance.now()));
"""
WATCH = """
new MutationObserver((_, observer) => {
  if (!document.querySelector("#prompt .turn")) return;
  observer.disconnect();
  performance.mark("shown");
}).observe(document, { childList: true, subtree: true });
"""


def long_rows(count):
    """Rows of two answers of 20 sentences and 250 tokens."""
    for i in range(count):
        row = answers(
            f"q{i}", f"One. {SENTENCE * 20}", f"Two. {SENTENCE * 20}", prompt=f"Q {i}?"
        )
        for response in row["responses"]:
            response["tokens"] = list(range(1000, 1250))
        yield row


def measure(driver, count, votes):
    """Print how long a folder takes to open and a vote to be stored."""
    folder = Path(tempfile.mkdtemp()) / "pairs"
    write_answers(folder, long_rows(count))
    size = (folder / "answers.jsonl").stat().st_size
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    tic = time.perf_counter()
    with process(folder) as (_, url):
        started = time.perf_counter() - tic
        opened = []
        for _ in range(5):
            driver.get(url)
            while not driver.execute_script(OPENED):
                time.sleep(0.01)
            opened.append(driver.execute_async_script(OPEN))
        taken = [driver.execute_async_script(VOTE) for _ in range(votes)]
        stored = len(labels(folder))
    print(f"{count:,} rows, {size / 1e6:.0f} MB; {stored} votes on the disk")
    print(f"  the command, until it prints the address  {started:6.2f} s")
    print(f"  the page, until the first answers show    {np.max(opened):6.0f} ms")
    for name, value in (("median", 50), ("95 %", 95), ("longest", 100)):
        found = np.percentile(taken, value)
        print(f"  a vote on the disk, the next shown {name:>8}{found:6.1f} ms")


def demo_folder(folder, *more, count=60):
    """The example's pairs, as answers to judge, some of which a function judged."""
    rows = [json.loads(line) for line in PAIRS.read_text("utf-8").splitlines()]
    found = []
    # The one on the pictures has a list.
    rows = [*rows[3:20], rows[2], *rows[20 : count + 2]]
    for i, row in enumerate(rows):
        texts = [row[name][-1]["content"] for name in ("chosen", "rejected")]
        found.append({**answers(f"q{i}", *texts, *more), "prompt": row["prompt"]})
    write_answers(folder, found)
    for i in range(count):
        better = float(i % 7 > 0)
        judge = "function:judge.py:score"
        append_label(
            folder, Label(f"q{i}", judge, "scores", scores=[better, 1.0 - better])
        )
    for i in range(17):
        label = Label(
            f"q{i}", "human:anna", "ranking", ranking=[[0], [1]], seconds=7.5 + i % 5
        )
        append_label(folder, label)


def take(driver, path):
    """Write what the window shows as a PNG of few colours, if Pillow is there."""
    time.sleep(0.5)
    driver.save_screenshot(str(path))
    with suppress(ImportError):
        from PIL import Image

        picture = Image.open(path).convert("RGB")
        picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


def screenshots(driver, target):
    """Take the pictures of the guide."""
    from selenium.webdriver.common.action_chains import ActionChains

    press = lambda *keys: ActionChains(driver).send_keys(*keys).perform()
    folder = Path(tempfile.mkdtemp()) / "pairs"
    demo_folder(folder)
    with process(folder) as (_, url):
        for name, width, height, scheme, scale in (
            ("light", 1200, 640, "light", 1.5),
            ("dark", 1200, 640, "dark", 1.5),
            ("phone", 390, 780, "light", 2),
        ):
            look(driver, width, height, scheme, scale)
            driver.get(url)
            take(driver, target / f"collect_{name}.png")
    rest = [
        "Pour in half a cup of **baking soda**, then a cup of vinegar. Wait half an hour "
        "and rinse with hot water.",
        "Call a plumber.",
    ]
    demo_folder(folder.with_name("four"), *rest)
    with process(folder.with_name("four")) as (_, url):
        look(driver, 1200, 760, "light", 1.5)
        driver.get(url)
        time.sleep(0.5)
        press("2")
        press("4")
        take(driver, target / "collect_places.png")


def main():
    """Measure, and take pictures if a folder for them is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--votes", type=int, default=200)
    parser.add_argument("--screenshots", type=Path, help="Folder of the pictures.")
    args = parser.parse_args()
    if not HAS_BROWSER:
        sys.exit(f"This {WHY_NOT}.")
    driver = open_browser()
    try:
        if args.votes:
            measure(driver, args.rows, args.votes)
        if args.screenshots:
            screenshots(driver, args.screenshots)
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
