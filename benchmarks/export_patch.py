# Copyright © 2026 MLX Contributors

"""Write this tree as one patch of upstream's own source.

SOURCE is a pristine source archive, or a folder with one unpacked, or a clone
of the release that ``pyproject.toml`` pins. Modules that extend upstream's are
folded into them; the rest is laid where it belongs. With black, isort and ruff.

    python benchmarks/export_patch.py SOURCE --out dpo.patch
    python benchmarks/export_patch.py --repo CLONE
    python benchmarks/export_patch.py --facts SOURCE
    python benchmarks/export_patch.py SOURCE --series FOLDER
"""

import argparse
import ast
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import series
from export_facts import changes, facts
from fold_upstream import TWIN, fold, point_home, reads_while_imported
from fresh_install import extract

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "feature/dpo-implementation"
MESSAGE = "Add preference training with DPO"
# What only this tree has: files that speak of it stay here, and who imports them.
TREE_ONLY = re.compile(r"setup\.py|pyproject\.toml|\+dpo\.")
FOLDERS = ("tests", "benchmarks")

build = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


CLI = f"{build.PACKAGE}/cli.py"


class Moved(ValueError):
    """Upstream is not what this tree extends."""


def unpack(source: Path, target: Path) -> Path:
    """Copy a source archive or folder, its git data aside, and return the copy."""
    if source.is_dir():
        ignore = shutil.ignore_patterns(
            ".git", ".*_cache", "__pycache__", "*.egg-info", "build"
        )
        return Path(shutil.copytree(source, target / "upstream", ignore=ignore))
    with tarfile.open(source) as archive:
        extract(archive, target)
    (folder,) = (path for path in target.iterdir() if path.is_dir())
    return folder


def release_of(source: Path) -> str | None:
    """Read the version of an unpacked release or of a clone, if it says one."""
    if (source / "PKG-INFO").is_file():
        lines = (source / "PKG-INFO").read_text().splitlines()
        return next(x[9:] for x in lines if x.startswith("Version: "))
    command = ["git", "describe", "--tags", "--abbrev=0"]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    return result.stdout.strip().removeprefix("v") or None


def check_same(name: str, found: bytes, expected: bytes) -> None:
    """Refuse a file of upstream's that is not the one this tree was built on."""
    if found != expected:
        digests = [sha256(text).hexdigest()[:12] for text in (found, expected)]
        raise Moved(
            f"{name}: upstream has moved, sha256 {digests[0]}, expected {digests[1]}: "
            "build this tree on that release first."
        )


def read_upstream(source: Path, name: str) -> bytes:
    """Read a file that the release must have."""
    if not (source / name).is_file():
        raise Moved(f"{name}: upstream has no such file.")
    return (source / name).read_bytes()


def insert_after(text: str, line: str, new: str, name: str) -> str:
    """Insert text behind the one place where ``line`` stands."""
    if text.count(line) != 1:
        raise Moved(f"{name}: needs {line.strip()!r} once, found {text.count(line)}.")
    return text.replace(line, line + new)


def package_files(root: Path, source: Path) -> dict[str, bytes]:
    """The files of the package: ours, and upstream's with ours folded in."""
    package = root / build.PACKAGE
    own = build.own_files(package)
    twins = {p for p in own if build.extends_twin(p)}
    stems = {path.stem for path in twins}
    files = {}
    for path in own:
        name = path.relative_to(root).as_posix()
        if path in twins:
            twin = path.with_name(TWIN + path.name)
            if not twin.is_file():
                raise Moved(f"{name}: not built yet, run pip install -e . first.")
            theirs = read_upstream(source, name)
            check_same(name, theirs, twin.read_bytes())
            late = frozenset(
                other.stem
                for other in own
                if other.suffix == ".py"
                and other not in twins
                and other.parent == path.parent
                and reads_while_imported(other.read_text(), path.stem)
            )
            text = fold(theirs.decode(), path.read_text(), path.stem, late)
            files[name] = point_home(text, stems).encode()
        elif path.suffix == ".py":
            files[name] = point_home(path.read_text(), stems).encode()
        else:
            files[name] = path.read_bytes()
        if path not in twins and (source / name).exists():
            raise Moved(f"{name}: upstream has a file of this name by now.")
    cli = cli_file(source)
    check_same(CLI, cli, (package / "cli.py").read_bytes())
    return files | {CLI: cli}


def cli_file(source: Path, commands: Iterable[str] = build.COMMANDS) -> bytes:
    """Upstream's list of commands, with some of ours."""
    text = build.insert_commands(read_upstream(source, CLI).decode(), commands)
    return text.encode()


def left_out(root: Path) -> set[str]:
    """Name the tests and benchmarks that work on this tree alone."""
    texts = {p.stem: p.read_text() for f in FOLDERS for p in (root / f).glob("*.py")}
    found = {stem for stem, text in texts.items() if TREE_ONLY.search(text)}
    while True:
        names = "|".join(map(re.escape, sorted(found)))
        importing = re.compile(rf"^(?:import|from) (?:{names})\b", re.M)
        more = {s for s, t in texts.items() if found and importing.search(t)}
        if more <= found:
            return found
        found |= more


def without_tools(text: str, tools: set[str]) -> str:
    """Leave sections and rows out that tell of scripts which stay in this tree."""
    names = re.compile("|".join(rf"\b{re.escape(t)}\.py" for t in sorted(tools)))
    if not tools:
        return text
    first, *sections = re.split(r"(?m)^(?=## )", text)
    rows = [x for x in first.splitlines(True) if x[:1] != "|" or not names.search(x)]
    return "".join(rows + [s for s in sections if not names.search(s)])


def folder_files(root: Path, source: Path) -> dict[str, bytes]:
    """Our tests and benchmarks, with what they read."""
    stay = left_out(root)
    twins = (p for p in build.own_files(root / build.PACKAGE) if build.extends_twin(p))
    stems = {path.stem for path in twins}
    files = {}
    for path in sorted(p for f in FOLDERS for p in (root / f).rglob("*")):
        name = path.relative_to(root)
        if not path.is_file() or build.hidden(name) or path.stem in stay:
            continue
        content = path.read_bytes()
        if path.suffix == ".py":
            content = point_home(content.decode(), stems).encode()
        elif path.name == "README.md":
            content = without_tools(content.decode(), stay).encode()
        if (source / name).exists():
            raise Moved(f"{name.as_posix()}: upstream has a file of this name by now.")
        files[name.as_posix()] = content
    return files


def data_patterns(files: dict[str, bytes]) -> list[str]:
    """Name what a wheel needs beside modules, as setuptools wants it."""
    prefix = f"{build.PACKAGE}/"
    patterns = set()
    for name in files:
        path = Path(name.removeprefix(prefix))
        module = path.suffix == ".py" and path.parts[0] != "examples"
        if name.startswith(prefix) and not module:
            patterns.add((path.parent / f"*{path.suffix}").as_posix())
    return sorted(patterns)


def project_file(
    text: str, patterns: list[str], commands: Iterable[str] = build.COMMANDS
) -> str:
    """Name the commands, their data files and what tests need."""
    name = "pyproject.toml"
    script = f'"{build.PACKAGE}.lora" = "{build.PACKAGE}.lora:main"\n'
    scripts = (script.replace("lora", command) for command in commands)
    text = insert_after(text, script, "".join(scripts), name)
    extra = re.search(r"^test = (\[.*\])$", text, re.M)
    if not extra:
        raise Moved(f"{name}: needs the extra 'test' in one line.")
    needs = sorted(
        ast.literal_eval(extra[1]) + build.TEST_REQUIREMENTS, key=str.casefold
    )
    line = "test = [" + ", ".join(f'"{need}"' for need in needs) + "]"
    text = text.replace(extra[0], line)
    if not patterns:
        return text
    table = "\n[tool.setuptools.package-data]\n"
    if table in text:
        raise Moved(f"{name}: upstream lists package data by now.")
    items = "".join(f'    "{pattern}",\n' for pattern in patterns)
    before = "namespaces = false\n"
    return insert_after(text, before, f"{table}{build.PACKAGE} = [\n{items}]\n", name)


def readme(text: str) -> str:
    """List DPO.md behind LORA.md."""
    items = re.findall(r"^\* (?:(?!^\* |^$).*\n)*", text, re.M)
    listed = [item for item in items if "LORA.md" in item]
    if len(listed) != 1:
        raise Moved(f"README.md: needs one item with LORA.md, found {len(listed)}.")
    url = re.findall(r"\((\S*)LORA\.md\)", listed[0])[0]
    new = f"* [Preference training with DPO]({url}DPO.md)\n"
    return text.replace(listed[0], listed[0] + new)


def shared_files(source: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """Upstream's project file and lists of documents, with our lines."""

    def read(name):
        return read_upstream(source, name).decode()

    guide = f"{build.PACKAGE}/README.md"
    link = "see the [LoRA documentation](LORA.md).\n"
    more = "For preference training see the [DPO documentation](DPO.md).\n"
    texts = {
        "pyproject.toml": project_file(read("pyproject.toml"), data_patterns(files)),
        "README.md": readme(read("README.md")),
        guide: insert_after(read(guide), link, more, guide),
    }
    return {name: text.encode() for name, text in texts.items()}


def export(root: Path, source: Path, target: Path) -> list[str]:
    """
    Lay the patch into ``target``, a copy of the release ``source``.

    Args:
        root (Path): This tree, built.
        source (Path): The release, unpacked; only read.
        target (Path): Where to write; may be ``source`` itself.

    Returns:
        list: Names of the files that were changed or added.

    Raises:
        Moved: If the release is not the one that the tree was built on.
        ValueError: If a module can't be folded.
    """
    version, pin = release_of(source), build.pinned_version(root / "pyproject.toml")
    if version not in (pin, None):
        raise Moved(f"{source.name}: upstream has moved to {version}, expected {pin}.")
    files = package_files(root, source) | folder_files(root, source)
    files |= shared_files(source, files)
    twins = [n for n, t in files.items() if re.search(rb"\b_upstream_\w+ import", t)]
    if twins:
        raise ValueError(f"{twins[0]}: still imports an upstream twin.")
    for name, content in files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return sorted(files)


def tidy(target: Path, names: list[str]) -> None:
    """Sort imports and format, then check all as upstream does."""
    modules = [name for name in names if name.endswith(".py")]
    for tool in ("isort", "black", "ruff"):
        if importlib.util.find_spec(tool) is None:
            raise ValueError(f"Needs {tool}, see .pre-commit-config.yaml.")
    for command in (
        ["isort", "--quiet", "--profile=black"],
        ["black", "--quiet"],
        ["isort", "--quiet", "--profile=black", "--check"],
        ["ruff", "check", "--quiet", "--no-cache", "--output-format=concise"],
    ):
        result = subprocess.run(
            [sys.executable, "-m", *command, *modules],
            cwd=target,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            said = (result.stdout + result.stderr).strip().partition("\n")[0]
            raise ValueError(f"{command[0]}: {said or 'not formatted'}")


def git(folder: Path, *arguments: str) -> bytes:
    """Run git in a folder, whatever the user's settings."""
    settings = ["core.autocrlf=false", "core.excludesFile=/dev/null"]
    options = [part for setting in settings for part in ("-c", setting)]
    result = subprocess.run(
        ["git", *options, *arguments], cwd=folder, capture_output=True
    )
    if result.returncode:
        said = result.stderr.decode().strip().partition("\n")[0]
        raise ValueError(f"git {arguments[0]}: {said}")
    return result.stdout


def make_patch(root: Path, source: Path, scratch: Path, clean: bool = True) -> bytes:
    """
    Write the unified diff from the release to the release with this tree.

    Args:
        root (Path): This tree, built.
        source (Path): A source archive, or the release unpacked.
        scratch (Path): An empty folder; ``exported`` in it is left as the result.
        clean (bool): Format and lint. Default: ``True``.

    Returns:
        bytes: The diff, for ``git apply``.

    Raises:
        ValueError: If upstream has moved, a module can't be folded or a tool fails.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder.")
    (scratch / "source").mkdir(parents=True)
    folder = unpack(source, scratch / "source")
    target = Path(shutil.copytree(folder, scratch / "exported"))
    git(target, "init", "--quiet")
    git(target, "add", "--all", "--force")
    before = git(target, "write-tree").decode().strip()
    if source.is_dir() and release_of(folder) is None:
        folder = source  # a clone knows its version by its tags
    names = export(root, folder, target)
    if clean:
        tidy(target, names)
    git(target, "add", "--all", "--force")
    return git(
        target, "diff", "--cached", "--no-color", "--no-ext-diff", "--binary", before
    )


def lay_prefix(
    source: Path, exported: dict[str, bytes], layer: int, target: Path
) -> dict[str, bytes]:
    """Write the files of the first layers over those of the release."""
    files = series.prefix(exported, layer)
    commands = [c for c in build.COMMANDS if f"{build.PACKAGE}/{c}.py" in files]
    if commands:
        files[CLI] = cli_file(source, commands)
    files["pyproject.toml"] = project_file(
        read_upstream(source, "pyproject.toml").decode(), data_patterns(files), commands
    ).encode()
    for name, content in files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    # Tables of modules may fit into a line now.
    tables = [n for n, x in files.items() if n.endswith(".py") and x != exported[n]]
    tidy(target, tables)
    return files


def make_series(root: Path, source: Path, scratch: Path, folder: Path) -> str:
    """
    Write one patch a layer, see ``series.LAYERS``.

    Args:
        root (Path): This tree, built.
        source (Path): A source archive, or the release unpacked.
        scratch (Path): An empty folder.
        folder (Path): Where the patches go, numbered.

    Returns:
        str: Lines, files and public names of each, as a Markdown table.

    Raises:
        ValueError: If the whole can't be exported, see ``make_patch``.
    """
    make_patch(root, source, scratch / "whole")
    whole = scratch / "whole" / "exported"
    (scratch / "source").mkdir()
    pristine = unpack(source, scratch / "source")
    names = git(whole, "ls-files").decode().splitlines()
    exported = {
        name: (whole / name).read_bytes()
        for name in names
        if not (pristine / name).is_file()
        or (pristine / name).read_bytes() != (whole / name).read_bytes()
    }
    target = Path(shutil.copytree(pristine, scratch / "series"))
    git(target, "init", "--quiet")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "| | layer | files | lines | of tests | public names |",
        "|---|---|---|---|---|---|",
    ]
    before, seen = "", set()
    for number, layer in enumerate(series.LAYERS, 1):
        git(target, "add", "--all", "--force")
        before = git(target, "write-tree").decode().strip()
        files = lay_prefix(pristine, exported, number, target)
        git(target, "add", "--all", "--force")
        options = ("--cached", "--no-color", "--no-ext-diff", "--binary", before)
        patch = git(target, "diff", *options)
        words = re.sub(r"\W+", "-", layer.title.lower()).strip("-")
        (folder / f"{number:04d}-{words}.patch").write_bytes(patch)
        rows = changes(patch.decode("utf-8", "replace"))
        added = sum(row[2] for row in rows)
        tests = sum(row[2] for row in rows if row[0].startswith("tests/"))
        new = {n: x for n, x in files.items() if n not in seen}
        theirs = {
            n: read_upstream(pristine, n) for n in new if (pristine / n).is_file()
        }
        known = series.public_names(theirs)
        found = [n for n in series.public_names(new) if n not in known]
        seen |= set(files)
        cells = number, layer.title, len(rows), f"{added:,}", f"{tests:,}"
        public = ", ".join(found)
        lines.append("| " + " | ".join(map(str, cells)) + f" | {public} |")
    return "\n".join(lines)


def make_branch(repo: Path, patch: bytes) -> None:
    """Commit the patch on a branch of its own in a clean clone."""
    if git(repo, "status", "--porcelain"):
        raise ValueError(f"{repo}: has changes of its own, commit or remove them.")
    with tempfile.NamedTemporaryFile(suffix=".patch") as file:
        file.write(patch)
        file.flush()
        git(repo, "apply", "--check", file.name)
        git(repo, "checkout", "--quiet", "-b", BRANCH)
        git(repo, "apply", "--index", file.name)
    git(repo, "commit", "--quiet", "--message", MESSAGE)


def main() -> None:
    """Write the patch, make the branch, or print the facts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", help="Archive or folder.")
    parser.add_argument("--out", type=Path, help="Default: standard output.")
    parser.add_argument("--series", type=Path, help="Write a patch a layer here.")
    parser.add_argument("--repo", type=Path, help=f"Clone to make {BRANCH} in.")
    parser.add_argument(
        "--facts", action="store_true", help="Print what it is made of."
    )
    args = parser.parse_args()
    source = args.repo or args.source
    if source is None:
        parser.error("needs SOURCE or --repo")
    try:
        if args.series:
            with tempfile.TemporaryDirectory() as scratch:
                print(make_series(ROOT, source, Path(scratch), args.series))
            return
        with tempfile.TemporaryDirectory() as scratch:
            patch = make_patch(ROOT, source, Path(scratch))
        if args.repo:
            make_branch(args.repo, patch)
        if args.out:
            args.out.write_bytes(patch)
        if args.facts:
            print(facts(ROOT, patch.decode()))
        elif not (args.out or args.repo):
            sys.stdout.buffer.write(patch)
    except (ValueError, SystemExit) as e:
        print(f"export_patch: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
