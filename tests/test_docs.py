"""What the documentation names exists: files, tests, commands, options, config keys, make targets, links, dependencies."""

from __future__ import annotations

import functools
import itertools
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from dist_egnn import cli, config
from dist_egnn.data import fields
from dist_egnn.planning import doctor

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*/README.md")])
FOLDERS = ("dist_egnn", "partition", "recipes", "tools", "tests", "docs", ".ci")
FILES = [*ROOT.iterdir(), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]
FILE_NAMES = {file.name for file in FILES if file.is_file()}
SHELL_ENDS = {"&&", "||", "|", ">", ">>", "2>", ";", "…"}


def code(text: str) -> tuple[list[str], list[str]]:
    """Blocks of code (fenced, or indented by four spaces) and code between backticks."""
    fence = re.compile(r"^```[^\n]*\n(.*?)^```$", re.M | re.S)
    blocks, text = fence.findall(text), fence.sub("", text)
    indented = re.compile(r"(?:^ {4}\S.*\n?)+", re.M)
    blocks += [re.sub(r"^ {4}", "", block, flags=re.M) for block in indented.findall(text)]
    return blocks, re.findall(r"`([^`\n]+)`", indented.sub("", text))


def commands(text: str) -> Iterator[list[str]]:
    """Commands as lists of words: the lines of code blocks and the code between backticks, split at shell operators."""
    blocks, spans = code(text)
    for line in [*"\n".join(blocks).replace("\\\n", " ").splitlines(), *spans]:
        try:
            words = shlex.split(line.removeprefix("$ "), comments=True)
        except ValueError:  # not a command
            continue
        for is_end, command in itertools.groupby(words, SHELL_ENDS.__contains__):
            if not is_end:
                yield list(command)


KEYS = set(config.keys())
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
PROGRAM: Any = typer.main.get_command(cli.app)
OPTIONS = {name: {o for p in command.params for o in p.opts} for name, command in PROGRAM.commands.items()}
OPTIONS[""] = {o for p in PROGRAM.params for o in p.opts}


def wrong_distegnn(words: list[str]) -> Iterator[str]:
    rest = [w for w in words if w != "--debug"]
    name = rest.pop(0) if rest and re.fullmatch(r"[a-z][a-z-]*", rest[0]) else ""  # not COMMAND, nor --help
    if name not in OPTIONS:
        yield f"distegnn {name}: no such command"
        return
    for word in rest:
        key, equals, _ = word.partition("=")
        if word.startswith("-") and key not in OPTIONS[name] | {"--help"}:
            yield " ".join(["distegnn", *filter(None, [name]), f"{key}: no such option"])
        if not word.startswith("-") and equals and key not in {"key", *KEYS}:
            yield f"{word}: no such config key"


def wrong_commands(text: str) -> Iterator[str]:
    """Commands, options, make targets and tests that do not exist."""
    for words in commands(text):
        program, rest = Path(words[0]).name, words[1:]
        if program == "distegnn":
            yield from wrong_distegnn(rest)
        elif program == "make":
            # `make PYTHON=… setup`
            yield from (f"make {w}: no such target" for w in rest if "=" not in w and w not in TARGETS)
        elif program.startswith("python") and rest and rest[0].endswith(".py") and (ROOT / rest[0]).is_file():
            sources = (rest[0], "dist_egnn/data/prepare.py", "dist_egnn/commands/recipe.py")
            known = "".join((ROOT / source).read_text() for source in sources)
            options = [w.split("=")[0] for w in rest[1:] if w.startswith("--")]
            yield from (f"{rest[0]} {o}: no such option" for o in options if f'"{o}"' not in known)
        elif program == "pytest":
            yield from wrong_selection(rest)


def wrong_selection(words: list[str]) -> Iterator[str]:
    """`pytest PATHS -k WORDS` must select a test by its name or its file's in one of the paths, by default in all."""
    picked = words[words.index("-k") + 1] if "-k" in words else ""
    paths = [w for w in words if not w.startswith("-") and w != picked] or ["tests"]
    files = [f for p in paths for f in ([ROOT / p] if p.endswith(".py") else sorted((ROOT / p).rglob("test_*.py")))]
    tests = [f"{f.stem} {t}" for f in files if f.is_file() for t in re.findall(r"def (test_\w+)", f.read_text())]
    for word in picked.split(" or ") if picked else [""]:
        if not any(word in test for test in tests):
            yield f"pytest {' '.join(words)}: selects no test"


def wrong_paths(text: str, page: Path) -> Iterator[str]:
    """Files, folders and link targets that do not exist."""
    blocks, spans = code(text)
    for word in re.findall(r"[\w./*-]+", "\n".join([*blocks, *spans])):
        path = word.rstrip(".").removeprefix("./")
        if path.split("/")[0] in FOLDERS and "/" in path and not list(ROOT.glob(path.rstrip("/"))):
            yield f"{path}: no such file"
    for span in spans:
        if re.fullmatch(r"[\w.]+\.(py|md|sh|toml)|Makefile", span) and span not in FILE_NAMES:
            yield f"{span}: no file of this name"
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            yield f"link {link}: no such file"
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            if anchor not in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}:  # as GitHub
                yield f"link {link}: no such heading"


def wrong_keys(text: str) -> Iterator[str]:
    """Config keys between backticks that do not exist: `train.epoch`, `model.name=EGNN`."""
    sections = "|".join(config.SECTIONS)
    for span in code(text)[1]:
        key = re.fullmatch(rf"((?:{sections})\.\w+)(=.*)?", span)
        if key and key[1] not in KEYS and span not in FILE_NAMES:
            yield f"{span}: no such config key"


@functools.cache
def identifiers() -> set[str]:
    texts = [file.read_text() for file in FILES if file.suffix == ".py"]
    return {word for text in texts for word in re.findall(r"class \w+|\w+", text)}


def wrong_identifiers(text: str, page: Path) -> Iterator[str]:
    """Names in the two pages that map formulas and questions to code, that occur in no source."""
    for span in code(text)[1] if page.name in ("architecture.md", "paper-map.md") else ():
        names = re.sub(r"^(?=[A-Z]\w*\.)", "class ", span).split(".")
        if re.fullmatch(r"[A-Za-z]\w*(\.\w+)*", span) and not set(names) <= identifiers():
            yield f"{span}: no such name"


def mistakes(text: str, page: Path) -> list[str]:
    return sorted({*wrong_commands(text), *wrong_paths(text, page), *wrong_keys(text), *wrong_identifiers(text, page)})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_short_and_its_names_exist(page):
    """At most 150 lines in the README, 200 elsewhere, 120 columns outside tables, three levels of headings."""
    assert mistakes(page.read_text(), page) == []
    lines = page.read_text().splitlines()
    counted = [line for line in lines if not line.startswith(("```", "# not run"))]  # marks of blocks
    assert len(counted) <= (150 if page == ROOT / "README.md" else 200)
    assert [line for line in lines if line.startswith("####") or (len(line) > 120 and line[0] != "|")] == []


GOOD = """\
`distegnn train x.yaml train.epochs=3 --resume`, `train.lr`, `tools/demo.py`, `demo.py`, `make test`,
[here](docs/quickstart.md#install), `pytest tests/test_docs.py -k mistakes`, `pytest -k test_docs`

    distegnn --debug partition a.h5 \\
        --out b && distegnn verify b > log
"""
EXAMPLES = {
    GOOD: "",
    "`distegnn fly`": "distegnn fly: no such command",
    "`distegnn train --fast`": "distegnn train --fast: no such option",
    "`distegnn train a.yaml train.epoch=3`": "train.epoch=3: no such config key",
    "```\nmake demo && distegnn partition x \\\n  --partz 3\n```": "distegnn partition --partz: no such option",
    "    $ .venv/bin/distegnn verify a --modle b\n": "distegnn verify --modle: no such option",
    "`make coffee`": "make coffee: no such target",
    "`pytest tests/test_docs.py -k absent`": "pytest tests/test_docs.py -k absent: selects no test",
    "`python tools/demo.py --cheap`": "tools/demo.py --cheap: no such option",
    "`dist_egnn/absent.py`": "dist_egnn/absent.py: no such file",
    "`absent.py`": "absent.py: no file of this name",
    "`train.epoch`": "train.epoch: no such config key",
    "[x](docs/quickstart.md#absent)": "link docs/quickstart.md#absent: no such heading",
    "![x](docs/img/absent.png)": "link docs/img/absent.png: no such file",
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_mistakes_are_found(text):
    assert "\n".join(mistakes(text, ROOT / "README.md")) == EXAMPLES[text]


def test_every_command_and_target_is_documented():
    """docs/commands.md and docs/import.md have every command with every option."""
    text = "".join((ROOT / "docs" / name).read_text() for name in ("commands.md", "import.md"))
    names = {option for options in OPTIONS.values() for option in options if option.startswith("--")} - {"--help"}
    names |= {f"distegnn {command}" for command in OPTIONS} | {f"make {target}" for target in TARGETS}
    assert {name for name in names if name not in text} == set()


def test_table_of_fields():
    row = re.compile(r"^\| `(\w+)` \| (\w+) \| \(.*\) \| (\w+) \| (\w+) \| (\S+) \| (.*) \|$", re.M)
    documented = row.findall((ROOT / "docs" / "conventions.md").read_text().replace("–", "-"))
    table = [(f.name, f.on, f.kind, ("no", "yes")[f.required], f.unit, f.meaning) for f in fields.TABLE]
    assert documented == table


def test_every_dependency_has_its_reason(monkeypatch):
    metadata: dict = {}
    monkeypatch.setattr("setuptools.setup", lambda **keywords: metadata.update(keywords))
    runpy.run_path(str(ROOT / "setup.py"))
    page = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in metadata["install_requires"]:
        name = re.split(r"[^\w-]", requirement)[0]
        assert re.search(rf"^\| {name} \| \w", page, re.M), name
    rows = dict(re.findall(r"^\| (\w+) \| (.*?) \| \S", page, re.M))
    extras = metadata["extras_require"]
    del extras["all"]  # the others but dev
    assert set(doctor.EXTRAS) == set(extras)
    for extra, requirements in extras.items():
        assert {re.split(r"[^\w-]", r)[0] for r in requirements} == set(rows[extra].split(", ")), extra
