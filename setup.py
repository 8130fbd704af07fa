# Copyright © 2026 MLX Contributors

"""Lay the pinned upstream release around this tree, then build the result.

A file below ``mlx_lm/`` is ours if upstream lacks it or if it imports its
``_upstream_`` twin. Every other file of the release is copied in: beside ours
as ``_upstream_NAME.py`` where we extend it, at its own place where we don't.
"""

import ast
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent
PACKAGE = "mlx_lm"
NAME = "mlx-lm"
COMMANDS = ("dpo", "dpo_collect")  # ours, listed after upstream's lora
PATCH = 1  # version = upstream's + "+dpo." + PATCH
TWIN = "_upstream_"
LICENSE_TWIN = f"{TWIN}LICENSE"  # goes along with every copy of upstream's files
TEST_REQUIREMENTS = ["hypothesis", "selenium"]  # what the tests need beside upstream's
TEST_RUNNER = ["pytest>=9", "pytest-xdist"]  # what runs them on every core
# CUDA's compiler builds kernels where there is no card.
TEST_COMPILER = [
    "nvidia-cuda-nvrtc; sys_platform == 'linux' and platform_machine == 'x86_64'"
]
EXTRAS = {"report": ["matplotlib"]}  # what is ours to choose
MANIFEST_HEADER = """\
# Written by setup.py: upstream's files, laid around ours. Edits to them are lost.
/.gitignore
"""


def pinned_version(pyproject: Path) -> str:
    """Read the upstream version out of the build requirements."""
    requires = tomllib.loads(pyproject.read_text())["build-system"]["requires"]
    pins = [r.partition("==")[2] for r in requires if r.startswith(f"{NAME}==")]
    if len(pins) != 1:
        raise SystemExit(
            f"{pyproject.name}: build-system.requires needs one '{NAME}==VERSION' "
            f"line, found {len(pins)}."
        )
    return pins[0]


def find_release(
    version: str, installed: Iterable[metadata.Distribution]
) -> metadata.Distribution:
    """Pick the distribution that is exactly ``version``, with its files on disk.

    The comparison is one of strings: to pip a patched ``0.32.2+dpo.1`` also
    satisfies ``==0.32.2``, and composing from it would nest the patch in itself.
    """
    candidates = list(installed)
    for dist in candidates:
        if dist.version == version:
            break
    else:
        found = ", ".join(dist.version for dist in candidates) or "none"
        raise SystemExit(
            f"The build needs plain {NAME} {version}, found {found}: build without "
            f"--no-build-isolation, or in an environment with {NAME}=={version}."
        )
    files = upstream_files(dist)
    missing = [name for name, path in files.items() if not path.is_file()]
    missing += [name for name in ("__init__.py", LICENSE_TWIN) if name not in files]
    if missing:
        raise SystemExit(
            f"{NAME} {version} in the build environment is incomplete "
            f"({missing[0]} is missing): reinstall it."
        )
    return dist


def upstream_files(dist: metadata.Distribution) -> dict[str, Path]:
    """Map each file of the release, relative to the package, to where it lies."""
    files: dict[str, Path] = {}
    for entry in dist.files or ():
        path = Path(str(dist.locate_file(entry)))
        if entry.parts[0] == PACKAGE and entry.suffix != ".pyc":
            files["/".join(entry.parts[1:])] = path
        elif entry.name == "LICENSE" and entry.parts[0].endswith(".dist-info"):
            files[LICENSE_TWIN] = path
    return files


def twin_of(name: str) -> str:
    """Name the place of upstream's file beside ours: ``a/_upstream_b.py``."""
    path = PurePosixPath(name)
    return str(path.with_name(TWIN + path.name))


def twin_imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (twin module, imported name) for each import of an upstream twin."""
    text = path.read_text()
    if TWIN not in text:
        return
    try:
        tree = ast.parse(text)
    except SyntaxError as e:
        raise SystemExit(f"{path}:{e.lineno}: {e.msg}.") from e
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for alias in node.names:
                if node.module is None and alias.name.startswith(TWIN):
                    yield alias.name, "*"
                elif node.module and node.module.startswith(TWIN):
                    yield node.module, alias.name


def extends_twin(path: Path) -> bool:
    """Tell whether the file imports its own upstream twin."""
    return path.suffix == ".py" and any(
        module == TWIN + path.stem for module, _ in twin_imports(path)
    )


def read_manifest(package: Path) -> set[str]:
    """List the files that the last build laid around ours."""
    manifest = package / ".gitignore"
    if not manifest.is_file():
        return set()
    lines = manifest.read_text().splitlines()
    return {line[1:] for line in lines if line[:1] == "/"} - {manifest.name}


def own_files(package: Path) -> list[Path]:
    """List the files of the package that are ours."""
    composed = read_manifest(package)
    return [
        path
        for path in sorted(package.rglob("*"))
        if path.is_file()
        and not hidden(path.relative_to(package))
        and (path.relative_to(package).as_posix() not in composed or extends_twin(path))
    ]


def hidden(path: Path) -> bool:
    """Tell whether no wheel should hold this: caches and dot files."""
    return any(part[0] == "." or part == "__pycache__" for part in path.parts)


def insert_commands(text: str, commands: Iterable[str] = COMMANDS) -> str:
    """Name our commands in the table of the ``mlx_lm`` program."""
    lines = text.splitlines(keepends=True)
    places = [i for i, line in enumerate(lines) if line.strip() == '"lora",']
    if len(places) != 1:
        raise SystemExit(
            f"{PACKAGE}/cli.py: dpo goes after the one line that names lora, "
            f"found {len(places)}."
        )
    line = lines[places[0]]
    more = [line.replace("lora", command) for command in commands]
    lines[places[0] + 1 : places[0] + 1] = more
    return "".join(lines)


def top_level_names(text: str) -> set[str]:
    """List the names that a module binds outside of its functions and classes."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(text)]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue
        if isinstance(node, ast.alias):
            names.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        todo.extend(ast.iter_child_nodes(node))
    return names


def plan(package: Path, release: dict[str, Path], version: str) -> dict[str, bytes]:
    """Decide what to write where; raise before anything is written."""
    edits: dict[str, Callable[[str], str]] = {
        "cli.py": insert_commands,
        "_version.py": lambda _: f"__version__ = {version!r}\n",
    }
    composed: dict[str, bytes] = {}
    known = read_manifest(package)
    for name, source in release.items():
        content = source.read_bytes()
        if name in edits:
            content = edits[name](content.decode()).encode()
        target = package / name
        if target.is_file() and extends_twin(target):
            composed[twin_of(name)] = content
            continue
        if target.is_file() and name not in known and target.read_bytes() != content:
            raise SystemExit(
                f"{PACKAGE}/{name}: upstream has this file and ours does not import "
                f"{TWIN}{target.stem}: import it, or remove the file."
            )
        composed[name] = content
    check_imports(package, composed, known)
    return composed


def check_imports(package: Path, composed: dict[str, bytes], known: set[str]) -> None:
    """Refuse a module of ours that extends what upstream does not have."""
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name in composed or (name in known and not extends_twin(path)):
            continue
        for module, wanted in twin_imports(path):
            twin = path.with_name(f"{module}.py").relative_to(package).as_posix()
            if twin not in composed:
                raise SystemExit(
                    f"{PACKAGE}/{name}: upstream has no "
                    f"{twin.replace(TWIN, '')} to extend."
                )
            names = top_level_names(composed[twin].decode())
            if wanted != "*" and wanted not in names:
                raise SystemExit(
                    f"{PACKAGE}/{name}: upstream's {twin.replace(TWIN, '')} has no "
                    f"{wanted!r} to import."
                )


def compose(root: Path, release: dict[str, Path], version: str) -> set[str]:
    """Lay the release around our files and return what was laid."""
    package = root / PACKAGE
    composed = plan(package, release, version)
    shutil.rmtree(root / "build" / "lib", ignore_errors=True)
    for name in read_manifest(package) - set(composed):
        path = package / name
        if path.is_file() and not extends_twin(path):
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    for name, content in composed.items():
        path = package / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    lines = "".join(f"/{name}\n" for name in sorted(composed))
    (package / ".gitignore").write_text(MANIFEST_HEADER + lines)
    return set(composed)


def split_requirements(lines: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Sort requirements into those of every install and those of each extra.

    Markers beside ``extra == ...`` are kept; where the marker is no plain chain
    of ``and`` it is kept whole, since setuptools only adds to it.
    """
    from packaging.requirements import Requirement

    base: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in lines:
        requirement = Requirement(line)
        marker = str(requirement.marker or "")
        names = re.findall(r'extra == "([^"]+)"', marker)
        if not names:
            base.append(line)
        elif " or " not in marker and "(" not in marker:
            terms = marker.split(" and ")
            rest = " and ".join(t for t in terms if not t.startswith("extra =="))
            requirement.marker = None
            line = f"{requirement} ; {rest}" if rest else str(requirement)
        for name in names:
            extras.setdefault(name, []).append(line)
    return base, extras


def describe(dist: metadata.Distribution) -> dict:
    """Turn the release's metadata into arguments of ``setuptools.setup``."""
    fields = dist.metadata
    base, extras = split_requirements(dist.requires or ())
    for extra in fields.get_all("Provides-Extra") or ():
        extras.setdefault(extra, [])
    extras |= {name: list(lines) for name, lines in EXTRAS.items()}
    if "test" in extras:
        extras["test"] += TEST_REQUIREMENTS + TEST_RUNNER + TEST_COMPILER
        extras["test"] += EXTRAS["report"]
    scripts: dict[str, list[str]] = {"console_scripts": []}
    for entry in dist.entry_points:
        scripts.setdefault(entry.group, []).append(f"{entry.name} = {entry.value}")
    scripts["console_scripts"] += [
        f"{PACKAGE}.{command} = {PACKAGE}.{command}:main" for command in COMMANDS
    ]
    return {
        "name": NAME,
        "version": f"{dist.version}+dpo.{PATCH}",
        "description": fields["Summary"],
        "license_expression": fields["License-Expression"],
        "python_requires": fields["Requires-Python"],
        "classifiers": fields.get_all("Classifier"),
        "project_urls": dict(
            url.split(", ", 1) for url in fields.get_all("Project-URL") or ()
        ),
        "install_requires": base,
        "extras_require": extras,
        "entry_points": scripts,
    }


def package_data(package: Path, packages: Iterable[str]) -> list[str]:
    """List what the wheel holds beside the modules of its packages."""
    folders = {package.parent / name.replace(".", "/") for name in packages}
    return [
        path.relative_to(package).as_posix()
        for path in sorted(package.rglob("*"))
        if path.is_file()
        and not hidden(path.relative_to(package))
        and not (path.suffix == ".py" and path.parent in folders)
    ]


def main() -> None:
    """Compose and hand over to setuptools."""
    from setuptools import find_packages, setup
    from setuptools.command.sdist import sdist

    version = pinned_version(ROOT / "pyproject.toml")
    dist = find_release(version, metadata.distributions(name=NAME))
    arguments = describe(dist)
    composed = compose(ROOT, upstream_files(dist), arguments["version"])
    packages = find_packages(str(ROOT), include=[PACKAGE, f"{PACKAGE}.*"])

    class PatchOnlySdist(sdist):
        """A source archive that holds what is ours, as the repository does."""

        def make_release_tree(self, base_dir: str, files: list[str]) -> None:
            left_out = {f"{PACKAGE}/{name}" for name in composed}
            ours = [f for f in files if Path(f).as_posix() not in left_out]
            super().make_release_tree(base_dir, ours)

    setup(
        **arguments,
        author="MLX Contributors",
        long_description=(ROOT / "README.md").read_text(),
        long_description_content_type="text/markdown",
        license_files=["LICENSE", f"{PACKAGE}/{LICENSE_TWIN}"],
        packages=packages,
        package_data={PACKAGE: package_data(ROOT / PACKAGE, packages)},
        include_package_data=False,
        cmdclass={"sdist": PatchOnlySdist},
    )


if __name__ == "__main__":
    main()
