# Copyright © 2026 MLX Contributors

"""Write what the code knows into DPO_REFERENCE.md and the example of a configuration.

Settings, shapes of rows, losses and the names of metrics stand between marks there; a
metric's unit and formula are kept as they are. A test says when they are out of date.

    python benchmarks/write_reference.py
"""

import re
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import yaml

import mlx_lm
from mlx_lm.preference.data.shapes import SHAPES
from mlx_lm.preference.measure.metrics import SUMS, mean_metrics
from mlx_lm.preference.objective.losses import LOSSES, PreferenceLoss
from mlx_lm.preference.setting import Setting
from mlx_lm.preference.settings.parser import build_parser
from mlx_lm.preference.settings.table import GROUPS

PACKAGE = Path(mlx_lm.__file__).parent
REFERENCE = PACKAGE / "DPO_REFERENCE.md"
EXAMPLE = PACKAGE / "examples" / "dpo_config.yaml"

# Where the reference says more about a setting.
MORE = {
    "hf_dataset": "#hugging-face-data",
    "weight_feature": "#weights-and-margins",
    "margin_feature": "#weights-and-margins",
    "criteria": "#criteria",
    "ranking_pairs": "#ranking",
    "transcripts": "#text-chat-and-transcripts",
    "loss_type": "#objectives",
    "optimizer_config": "#optimizers",
    "lr_schedule": "#learning-rate-schedules",
    "fine_tune_type": "#what-is-trained",
    "train_head": "#training-the-head",
    "reference_model": "#the-reference-policy",
    "reference_cache": "#the-reference-cache",
    "token_cache": "#the-token-cache",
    "save_every": "#checkpoints",
    "report_to": "#trackers",
    "adapter_path": "DPO.md#compare-runs",
    "resume": "DPO.md#stop-and-go-on",
    "report": "DPO.md#the-report",
    "inspect": "DPO.md#single-pairs",
    "sample_prompts": "DPO.md#sample-answers",
    "retain_data": "DPO.md#ordinary-text",
}
# What the example sets, and what it shows of settings that are not one number or word.
SET = {"train": True, "data": "path/to/preference/data"}
SHOWN = {
    "hf_dataset": """\
hf_dataset:
  path: "HuggingFaceH4/ultrafeedback_binarized"
  train_split: "train_prefs[:10%]"
  valid_split: "test_prefs[:200]"
""",
    "criteria": "criteria: {helpful: 1.0, honest: 0.5}\n",
    "optimizer_config": "adamw: {bias_correction: true, weight_decay: 0.0}\n",
    "lr_schedule": """\
lr_schedule: {name: "cosine", warmup_steps: 100}  # or constant, linear
lr_schedule:
  name: cosine_decay             # a function of mlx.optimizers
  arguments: [1e-5, 1000, 1e-7]  # peak, updates, end
  warmup: 100
""",
}
RESUME = {"free": "yes", "same": "anyway", "shape": "no"}
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
KINDS |= {dict: "mapping"}


def row(*cells: str) -> str:
    """One row of a table."""
    return f"| {' | '.join(cells)} |\n"


def head(*names: str) -> str:
    """The first two lines of a table."""
    return row(*names) + "|" + "---|" * len(names) + "\n"


def code(text: str) -> str:
    """Text as code in a cell."""
    return "`" + text.replace("|", r"\|") + "`"


def written(value: object) -> str:
    """A value as YAML has it, in one line."""
    if isinstance(value, str):
        return f'"{value}"'
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return text.split("\n")[0]


def kind_of(one: Setting) -> str:
    """What a setting's values are."""
    if one.choices and len(one.choices) < 8:
        return ", ".join(code(f"{x}") for x in one.choices)
    text = KINDS.get(one.type, "") if one.type else ""
    if one.range:
        text += f", {one.range}"
    return text + (", or a list" if one.several else "")


def settings() -> str:
    """A table for each group of settings."""
    flags: dict[str, list[str]] = {}
    for action in build_parser()._actions:
        flags.setdefault(action.dest, []).extend(map(code, action.option_strings))
    text = ""
    for title, group in GROUPS.items():
        names = ("key", "flag", "default", "values", "meaning", "resume", "test", "set")
        text += f"### {title}\n\n{head(*names)}"
        for one in group:
            name = code(one.name)
            if one.name in MORE:
                name = f"[{name}]({MORE[one.name]})"
            text += row(
                name,
                ", ".join(flags.get(one.name, [])),
                code(written(one.default).strip('"')),
                kind_of(one),
                # What looks like a name is one.
                re.sub(r"\b\w+_[\w.]+\w|--\w[\w-]+", r"`\g<0>`", one.help),
                RESUME[one.resume],
                "yes" if one.tested else "",
                "yes" if one.per_dataset else "",
            )
        text += "\n"
    return text.removesuffix("\n")


def needs(loss: PreferenceLoss) -> Iterable[str]:
    """What a loss needs, in words."""
    if not loss.reference:
        yield "no reference"
    if loss.per_token:
        yield "counts tokens"
    if loss.couples:
        yield "couples the batch"
    if loss.data != "pairs":
        yield f"data: {loss.data}"
    if loss.smoothing == "may":
        yield "may be smoothed"
    if loss.smoothing == "must":
        yield "`label_smoothing` above 0"
    yield from map(code, loss.options)


def objectives() -> str:
    """The table of losses."""
    return head("`loss_type`", "loss of a pair", "paper", "") + "".join(
        row(
            code(name),
            code(loss.formula),
            f"[{loss.paper}](https://arxiv.org/abs/{loss.paper})",
            ", ".join(needs(loss)),
        )
        for name, loss in LOSSES.items()
    )


def shapes() -> str:
    """Which columns tell which shape."""
    text = head("columns", "shape")
    for shape in SHAPES:
        link = f"[{shape.name}](#{shape.name.lower().replace(' ', '-')})"
        if shape.columns:
            text += row(shape.columns, link + (f": {shape.more}" if shape.more else ""))
    return text


def metrics(before: str) -> str:
    """The names of what training, validation and tests report."""
    known = {
        cells[0]: cells[1:]
        for line in before.splitlines()
        if len(cells := re.split(r" *(?<!\\)\| *", line.strip("| "))) == 3
    }
    names = mean_metrics(dict.fromkeys([*SUMS, "kl"], mx.array(0.0)))
    # Those that the file has stay in its order.
    order = [name for name in known if name.strip("`") in names]
    order += [code(name) for name in names if code(name) not in known]
    text = head("name", "unit", "formula")
    return text + "".join(row(name, *known.get(name, ("", ""))) for name in order)


def contents(text: str) -> str:
    """The two upper levels of headings."""
    lines = []
    for level, title in re.findall(r"^(###?) (.*)$", outside_code(text), re.M):
        if title != "Contents":
            anchor = re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
            lines.append(f"{'  ' * (len(level) - 2)}- [{title}](#{anchor})\n")
    return "".join(lines)


def outside_code(text: str) -> str:
    """Markdown without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def reference(text: str) -> str:
    """The reference with everything between its marks as the code has it."""

    def put(name, new):
        nonlocal text
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        old, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{REFERENCE.name} has no marks of {name}.")
        text = before + start + (new(old) if callable(new) else new) + end + after

    put("settings", settings())
    put("shapes", shapes())
    put("losses", objectives())
    put("metrics", metrics)
    put("contents", contents(text))
    return text


def example(text: str) -> str:
    """The example: its first lines, then every setting with its help."""
    text = text[: text.index("\n\n") + 1]
    for title, group in GROUPS.items():
        text += f"\n# --- {title} ---\n"
        for one in group:
            if one.name == "config":
                continue
            text += "\n" + comment(one)
            value = SET.get(one.name, one.default)
            text += f"{one.name}: {written(value)}\n"
    return text


def comment(one: Setting) -> str:
    """A setting's help, its choices and what else it may look like."""
    words, lines, line = one.help.split(), [], "#"
    if one.choices:
        words += f"One of {', '.join(map(str, one.choices))}.".split()
    shown = SHOWN.get(one.name, "").splitlines()
    if shown:
        words += ["For", "example:"]
    for word in words:
        if len(line) + len(word) >= 88:
            lines.append(line)
            line = "#"
        line += f" {word}"
    return "".join(f"{x}\n" for x in [*lines, line, *(f"# {x}" for x in shown)])


def main() -> None:
    """Write both files."""
    for path, write in ((REFERENCE, reference), (EXAMPLE, example)):
        path.write_text(write(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
