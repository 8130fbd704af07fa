# Copyright © 2026 MLX Contributors

"""The patch as a series: which layer every file belongs to, and what a prefix lacks.

A layer is whole files, with two cuts that need no mark in them: a table ``PLUG_INS``
lists modules, and those of higher layers are left out; a guide has sections, and those
that a layer names come with it.
"""

import ast
import re
import textwrap
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mlx_lm"
TWIN = "_upstream_"
# Where a row of the table begins, if not with a slash.
HOME = f"{PACKAGE}/preference/"


class Layer(NamedTuple):
    """What one patch of the series brings."""

    title: str
    # A folder ends with a slash, and stands for all in it that no layer names itself.
    files: str
    # Tests and benchmarks that are of a higher layer than what they import.
    tests: str = ""
    # Headings of the guides, of which the others are of their file's layer.
    sections: tuple[str, ...] = ()


LAYERS = (
    Layer(
        "dpo_loss and three losses",
        "__init__.py errors.py plug_ins.py setting.py objective/ forward/__init__.py "
        "forward/tokens.py /mlx_lm/tuner/losses.py",
    ),
    Layer(
        "PreferenceDataset",
        "data/ files.py terminal.py device.py /mlx_lm/tuner/datasets.py",
    ),
    Layer(
        "dpo_step, train_dpo and the command",
        "features.py ranks.py step.py training.py update.py batch/ forward/ measure/ policy/ "
        "reference/__init__.py reference/live.py run/ settings/ "
        "/mlx_lm/tuner/ /mlx_lm/dpo.py /mlx_lm/cli.py /mlx_lm/README.md /README.md "
        "/mlx_lm/DPO.md",
    ),
    Layer("One kernel for log-probs and their KL", "forward/fused.py /mlx_lm/kernels/"),
    Layer(
        "Other files, models, adapters and references",
        "data/tables.py data/saved.py data/hub.py data/secrets.py data/bounds.py "
        "data/bounded.py data/arrow.py data/large.py data/sample.py "
        "data/rewritten.py data/borders.py data/columns.py data/pair_shapes.py "
        "settings/datasets.py "
        "policy/adapter.py policy/head.py policy/start.py policy/peft.py policy/gpt2.py "
        "policy/reference.py run/compressed.py "
        "settings/earlier.py settings/adopt.py run/notices.py",
        tests="test_preference_tokens.py",
    ),
    Layer(
        "Shared prompts",
        "forward/caches.py forward/shared.py forward/probe.py batch/relaid.py run/layouts.py",
        tests="test_completion_head.py test_preference_batches.py",
    ),
    Layer(
        "A reference that is asked once",
        "digest.py reference/ forward/common.py forward/dropout.py",
        tests="test_token_scores.py",
    ),
    Layer(
        "Checkpoints, resuming and several ranks",
        "run/checkpoint.py run/identity.py run/resume.py run/state.py run/lock.py "
        "run/signals.py run/best.py settings/together.py",
        sections=("Stop and go on", "Several Macs"),
        tests="resuming.py killing.py test_kill.py test_full_disk.py test_files.py",
    ),
    Layer(
        "Other objectives, rankings, labels, and a reference that moves",
        "objective/more_losses.py data/rankings.py data/published.py "
        "data/more_shapes.py reference/moving.py coupled.py",
        tests="test_objectives.py test_objective_checks.py "
        "test_objective_parity.py test_sequence_weights.py "
        "test_preference_rows.py test_conversations.py "
        "test_preference_files.py test_other_turns.py test_row_options.py",
    ),
    Layer(
        "Packed rows, lean layers and master weights",
        "batch/packing.py forward/packed.py forward/recompute.py policy/masters.py",
        tests="test_layouts.py test_length_buckets.py test_preference_metrics.py",
    ),
    Layer(
        "Tests, comparisons, single pairs, watchers and reports",
        "report/ watch/ data/collected.py measure/pair_metrics.py measure/pair_scores.py "
        "run/reading.py settings/finished.py",
        sections=("Look at it", "Test it", "Compare runs", "Serve it"),
        tests="test_dpo_adapters.py test_finished_runs.py test_inspection.py "
        "test_bad_input.py "
        "test_terminal.py test_memory_growth.py",
    ),
    Layer(
        "Token ids and built kernels that are kept",
        "data/cache.py data/fingerprint.py data/processes.py run/kernels.py "
        "run/tokens.py",
        tests="test_ranks.py",
    ),
    Layer(
        "The forecast of memory, the reference of settings, and a quickstart",
        "memory/ run/forecast.py /mlx_lm/DPO_REFERENCE.md /mlx_lm/examples/",
        sections=(
            "Settings in a file",
            "Memory",
            "From Python",
            "When something looks wrong",
        ),
        tests="test_example_preferences.py test_dpo_quickstart.py test_dataset_fuzz.py "
        "test_dpo_docs.py test_public_api.py test_smollm2.py "
        "test_dpo_config.py test_compressed_reference.py",
    ),
    Layer(
        "Collected preferences",
        "collect/ /mlx_lm/dpo_collect.py /mlx_lm/DPO_COLLECT.md",
        tests="test_given_tokens.py test_parity.py test_retained_text.py "
        "test_setting_effects.py",
    ),
)
# All that has no layer of its own, such as benchmarks and pyproject.toml.
LAST = len(LAYERS)


def _rows(field: str, home: str) -> dict[str, int]:
    """The layers of what the table names, by its path."""
    return {
        name[1:] if name.startswith("/") else home + name: number
        for number, layer in enumerate(LAYERS, 1)
        for name in getattr(layer, field).split()
    }


FILES = _rows("files", HOME)
TESTS = _rows("tests", "tests/")


def layer_of(name: str, files: dict[str, bytes]) -> int:
    """The layer of a file of the patch, which is one of ``files``."""
    if name.startswith("benchmarks/"):
        return LAST
    if name.startswith("tests/"):
        is_test = name.startswith("tests/test_")
        needed = _needed(name, files, set())
        return needed if is_test else max(needed, _asked(name, files))
    place = name
    while place and place not in FILES:
        place = place.rstrip("/").rpartition("/")[0]
        place += "/" * bool(place)
    return FILES.get(place, LAST)


def _needed(name, files, seen):
    """The highest layer of what a test imports, and what the table says of it."""
    found = [TESTS.get(name, 1)]
    if not name.endswith(".py") or name in seen:
        return found[0]
    seen.add(name)
    for module in imported(files[name].decode(), name):
        path = module.replace(".", "/")
        near = (f"{folder}/{path}.py" for folder in ("tests", "tests/fixtures"))
        if f"benchmarks/{path}.py" in files:
            return LAST
        found += [_needed(other, files, seen) for other in near if other in files]
        # The module, the one that has this name in it, or a package with the name.
        above = path.rpartition("/")[0]
        places = (f"{path}.py", f"{above}.py", f"{above}/__init__.py")
        ours = (x for x in places if x in files and x.startswith(f"{PACKAGE}/"))
        if other := next(ours, None):
            found.append(layer_of(other, files))
    return max(found)


def _asked(name, files):
    """The lowest layer of the tests that name a file, or what names it for them."""
    found, waiting = {name}, [name]
    while waiting:
        path = PurePosixPath(waiting.pop())
        # A folder of fixtures is named whole.
        folder = path.parts[2] if len(path.parts) > 3 else ""
        stem = (f'"{folder}"' if folder else path.stem).encode()
        named = {x for x in files if x.startswith("tests/") and stem in files[x]}
        new = {x for x in named - found if x.endswith(".py")}
        waiting += [x for x in new if not x.startswith("tests/test_")]
        found |= new
    tests = (x for x in found if x.startswith("tests/test_"))
    return min((layer_of(x, files) for x in tests), default=LAST)


@cache
def imported(text: str, name: str) -> set[str]:
    """What a file imports, a test also in its texts, as dotted names."""
    found = set()
    package = name.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
            found |= {base} if base.count(".") == 0 else set()
        if isinstance(node, ast.Constant) and name.startswith("tests/"):
            # A target of mock.patch, or a program of its own.
            found |= set(re.findall(rf"\b{PACKAGE}(?:\.\w+)+", str(node.value)))
    return found


def cut(name: str, content: bytes, present: set[str], layer: int) -> bytes:
    """Leave out of a file what is of layers that are not there."""
    if name.endswith(".md"):
        return _cut_sections(content.decode(), layer).encode()
    if not name.endswith(".py") or b"\nPLUG_INS = " not in content:
        return content
    text, folder = content.decode(), name.rpartition("/")[0]
    for node in ast.parse(text).body:
        if (
            not isinstance(node, ast.Assign)
            or ast.unparse(node.targets[0]) != "PLUG_INS"
        ):
            continue
        names = ast.literal_eval(node.value)
        there = [n for n in names if f"{folder}/{n.replace('.', '/')}.py" in present]
        rows = "".join(f'"{n}", ' for n in there).rstrip()
        old = ast.get_source_segment(text, node) or ""
        text = text.replace(old, f"PLUG_INS = ({rows})", 1)
    return text.encode()


def _cut_sections(text, layer):
    later = {
        title
        for number, one in enumerate(LAYERS, 1)
        for title in one.sections
        if number > layer
    }
    first, *sections = re.split(r"(?m)^(?=## )", text)
    kept = [s for s in sections if s[3:].partition("\n")[0] not in later]

    def contents(match):
        items = re.split(r"\s·\s", match[0])
        left = [x for x in items if " ".join(x[1:].split("]")[0].split()) not in later]
        return "\n".join(textwrap.wrap(" · ".join(left), 88, break_on_hyphens=False))

    first = re.sub(r"(?m)^\[[^\]]+\]\(#[^·]*·(?s:.*?)(?=\n\n)", contents, first)
    return "".join([first, *kept])


def prefix(files: dict[str, bytes], layer: int) -> dict[str, bytes]:
    """The files of the first layers, by name."""
    there = {name: x for name, x in files.items() if layer_of(name, files) <= layer}
    return {name: cut(name, x, {*there}, layer) for name, x in there.items()}


def public_names(files: dict[str, bytes]) -> list[str]:
    """What files bring that people import, and the commands."""
    found = []
    for name, content in files.items():
        if not name.endswith(".py") or not name.startswith(f"{PACKAGE}/"):
            continue
        if name.startswith((HOME, f"{PACKAGE}/examples/")):
            continue
        nodes = ast.parse(content.decode()).body
        kinds = (ast.FunctionDef, ast.ClassDef)
        found += [n.name for n in nodes if isinstance(n, kinds) and n.name[0] != "_"]
    return found
