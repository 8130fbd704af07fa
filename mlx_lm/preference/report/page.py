# Copyright © 2026 MLX Contributors

"""A run's ``report.html`` and ``curves.png``, from what is in its adapter folder.

python -m mlx_lm.preference.report.page adapters
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from jinja2 import Environment, StrictUndefined

from ..errors import InputError
from ..files import write_text, writing
from ..measure.pair_metrics import FILE_NAME as TEST_FILE
from ..objective.objective import objective_of
from ..run.reading import read_json, read_lines
from ..terminal import counted, rprint, visible
from ..watch import retained_text, samples
from ..watch.trackers import check_matplotlib
from . import charts as drawing
from .inspect import FILE_NAME as PAIRS_FILE
from .review import FILE_NAME as REVIEW_FILE
from .review import again_command
from .table import metrics_table

PAGE, PICTURE = "report.html", "curves.png"
# Of an earlier run in the same folder they would be wrong.
LEFT_BY_TESTS = (PAGE, PICTURE, TEST_FILE, PAIRS_FILE, REVIEW_FILE)
MOST_LOOKS = 50
TEMPLATE = Path(__file__).with_name("page.html.j2")


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` and ``curves.png`` into a run's folder."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").exists():
        raise InputError(
            f"{folder} has no metrics.jsonl: name the adapter folder of a mlx_lm.dpo "
            "run."
        )
    check_matplotlib()
    # Beside numbers, reports hold what no chart shows.
    reports = [
        {k: v for k, v in line.items() if v is None or type(v) in (int, float)}
        for line in read_lines(folder / "metrics.jsonl", iteration=(int,))
    ]
    config = read_json(folder / "adapter_config.json")
    page = folder / PAGE
    charts = drawing.curves(reports)
    title = visible(f"{Path(str(config.get('model', 'A model'))).name} · {folder.name}")
    with writing(page):
        write_text(page, render(folder, title, config, reports, charts))
        if charts:
            drawing.write_png(charts, folder / PICTURE, title)
    return page


def render(
    folder: Path,
    title: str,
    config: dict[str, Any],
    reports: list[dict[str, Any]],
    charts: list[drawing.Chart],
) -> str:
    """Render the page. Every text in it is escaped."""
    names = TEST_FILE, retained_text.FILE_NAME, PAIRS_FILE, samples.FILE_NAME
    test, text, single, answers = (folder / name for name in names)
    settings = folder / "adapter_config.json"
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        # Markup is what was drawn here; all else may have come from anywhere.
        finalize=lambda x: visible(x, "\n\t\r") if type(x) is str else x,
    )
    noun = _part(
        settings, "pairs", lambda: objective_of(SimpleNamespace(**config)).noun
    )
    # What the test measured from: another model is no earlier state of this one.
    is_other = config.get("reference_model") or config.get("reference_bits")
    before = "reference" if is_other else "before"
    metrics, retained, pairs = map(read_json, (test, text, single))
    shown = {k: v for k, v in config.items() if v is not None and k != "versions"}
    tested = _part(test, ("", []), lambda: _test(metrics, before, noun))
    retained_line = _part(text, "", lambda: _retained_line(retained))
    change = retained if retained_line else {}
    lines = read_lines(answers, **samples.LINE)
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        title=title,
        subtitle=_part(settings, "", lambda: _subtitle(config, reports)),
        tiles=_part(text, [], lambda: _tiles(reports, change, noun)),
        charts=[
            (chart.title, drawing.svg(drawing.draw_curves, f"c{i}", chart=chart))
            for i, chart in enumerate(charts)
        ],
        tested=tested[0],
        table=tested[1],
        retained=retained_line,
        pictures=_part(single, [], lambda: [*_test_pictures(metrics, pairs, before)]),
        samples=_part(answers, [], lambda: _samples(lines)),
        pairs=_part(single, [], lambda: [*_pair_groups(pairs.get("pairs", []))]),
        looks=_part(folder / REVIEW_FILE, [], lambda: _looks(folder)),
        again=again_command(config.get("data") or "", folder),
        settings=sorted(shown.items()),
        versions=_part(
            settings, [], lambda: sorted((config.get("versions") or {}).items())
        ),
    )


def _part(file: Path, default: Any, make: Callable[[], Any]) -> Any:
    """A part of the page; a file that holds something else is left out."""
    try:
        return make()
    except (KeyError, IndexError, AttributeError, TypeError, ValueError):
        rprint(f"[WARNING] {file} is damaged: what it says is left out.")
        return default


def _test(metrics, before, noun):
    """What was tested, and the table of it."""
    if not metrics:
        return "", []
    tested = ""
    if "test/data" in metrics:
        count = counted(round(metrics["pairs"]), noun.removesuffix("s"))
        tested = (
            f"{count} of {metrics['test/data']}, at most "
            f"{metrics['test/max_seq_length']:,} tokens long."
        )
    return tested, metrics_table({"after": metrics}, before, noun)


def _subtitle(config, reports):
    rate, losses = config.get("learning_rate"), config.get("loss_type")
    parts = [
        config.get("fine_tune_type"),
        " + ".join(losses) if isinstance(losses, list) else losses,
        f"beta {config['beta']:g}" if "beta" in config else None,
        f"learning rate {rate:.1e}" if rate else None,
        f"step {reports[-1]['iteration']:,}" if reports else None,
        str(config.get("data") or config.get("hf_dataset") or ""),
    ]
    return " · ".join(str(part) for part in parts if part)


def _tiles(reports, retained, noun):
    """What is asked first: the last validation beside the first one."""
    held_out = [r for r in reports if "val_loss" in r]
    tiles = []
    for label, key, form in (
        ("Loss", "val_loss", "{:.3f}"),
        ("Reward accuracy", "val_rewards/accuracies", "{:.1%}"),
        ("Reward margin", "val_rewards/margins", "{:+.3f}"),
        ("Chosen likelier", "val_logps/accuracies", "{:.1%}"),
    ):
        values = [r[key] for r in held_out if key in r]
        values = ["-" if x is None else form.format(x) for x in values]
        if values:
            note = f"at the start {values[0]}"
            if "rewards/" in key:
                # The start is its own reference: it has no rewards.
                count = round(held_out[-1].get("val_pairs", 0))
                note = counted(count, noun.removesuffix("s"))
            label = f"{label}, held out"
            tiles.append({"label": label, "value": values[-1], "note": note})
    if retained.get("change") is not None:
        change = f"{100 * retained['change']:+.1f} %"
        note = f"of {Path(retained['file']).name}"
        tiles.append({"label": "Perplexity", "value": change, "note": note})
    return tiles


def _retained_line(retained):
    if not retained:
        return ""
    # What the line says is computed again.
    fields = {k: v for k, v in retained.items() if k != "change"}
    if fields["after"] is None:
        fields["after"] = math.inf  # What JSON has no number for.
    return retained_text.RetainedText(**fields).line()


def _test_pictures(metrics, single, before):
    margins = {
        name: [x for x in single.get(name, []) if x is not None]
        for name in ("before", "after")
    }
    if margins["after"]:
        picture = drawing.svg(drawing.draw_histogram, "ch", **margins, start=before)
        yield "Margins of the test pairs", picture
    names = ("confidence", "accuracy")
    curve = {name: metrics.get(f"calibration/{name}") for name in names}
    if curve["accuracy"]:
        picture = drawing.svg(drawing.draw_reliability, "cr", **curve)
        yield "Is it as sure as it is right?", picture


def _samples(lines):
    """Prompts, and the answers to each one: the reference's, then first to last."""
    by_prompt: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        it, reference = line["iteration"], line.get("reference")
        key, when = json.dumps(line["prompt"]), f"step {it:,}" if it else "before"
        if it == 0 and reference == line["answer"]:
            when = "before, as the reference"
        elif key not in by_prompt and isinstance(reference, str):
            by_prompt[key] = [{"when": "reference", "answer": reference}]
        answers = by_prompt.setdefault(key, [])
        answers.append({"when": when, "answer": line["answer"]})
    return [(samples.prompt_text(json.loads(k)), x) for k, x in by_prompt.items()]


def _pair_groups(pairs):
    for right, title, note in (
        (False, "wrong", "The reward prefers the rejected answer, the most first."),
        (True, "right", "The reward prefers the chosen answer, the most first."),
    ):
        shown = [_shown(pair) for pair in pairs if pair["right"] is right]
        heading = (
            f"A {title} pair" if len(shown) == 1 else f"{len(shown)} {title} pairs"
        )
        if shown:
            yield {"title": heading, "note": note, "pairs": shown, "right": right}


def _shown(pair):
    texts = {name: str(pair[name]) for name in ("prompt", "chosen", "rejected")}
    place = f"pair {pair['pair']:,} · " if "pair" in pair else ""
    return texts | {"place": place, "margin": f"{pair['margin']:+.3f}"}


def _looks(folder):
    """Labels that may be wrong, the likeliest first."""
    lines = read_lines(folder / REVIEW_FILE, id=(str,), why=(str,))
    return [(line["id"], line["why"]) for line in lines[:MOST_LOOKS]]


def show_report(folder: str | Path) -> None:
    """Write a run's report, and say where."""
    if mx.distributed.init().rank() == 0:
        rprint(f"Wrote {write_report(folder)}")


def main() -> None:
    """Render the reports of finished runs."""
    parser = argparse.ArgumentParser(description="Render a run's report.html.")
    parser.add_argument("folders", nargs="+", help="Adapter folders of finished runs.")
    try:
        for folder in parser.parse_args().folders:
            print(f"Wrote {write_report(folder)}")
    except (ValueError, OSError) as e:
        print(f"Error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
