"""Every command of the pages, also of blocks that do not run, is accepted by its parser as typed, in the page's order.

Parsers stop before the work. Configs are read with their overrides. Files that a command reads are in the repository
or made by an earlier command of the page, unless the block says what it needs.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from test_docs import PAGES, PROGRAM, ROOT, TARGETS, wrong_selection
from test_docs_commands import BEFORE, FENCE, SHELL, blocks, link_folders

from dist_egnn import cli, config
from dist_egnn.commands import sweep_config
from dist_egnn.launch import hostfile
from dist_egnn.planning import doctor

INDENTED = re.compile(r"(?:^ {4}\S.*\n(?:^ {5,}\S.*\n)*)+", re.M)
KEYWORDS = {"if", "then", "else", "do", "while", "until", "!"}  # before a command
OTHERS = {"[", "fi", "done", "trap", "wait", "kill", "sleep", "exit", "scontrol", "cut", "diff", "echo", "export"}
OTHERS |= {"apt-get"}
READ = ("config", "model", "data", "run", "sources", "store", "file", "resume")
WRITTEN = ("out", "suggest", "records", "kept")
TYPED = {"method": "partition", "halo": "partition", "seed": "partition", "parts": "partition"}  # options that are keys


class Parsed(BaseException):
    """Raised in place of a script's work, with its options."""


def shell_blocks(page: Path) -> list[str]:
    """The blocks of commands of a page: fenced, or indented by four spaces."""
    fenced = [content for language, _, content in blocks(page) if language in ("sh", "bash")]
    rest = INDENTED.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return fenced + [re.sub(r"^ {4}", "", text, flags=re.M) for text in rest if SHELL.match(text)]


def commands(block: str) -> Iterator[tuple[list[str], str]]:
    """Words of each command, and the file that its output goes to."""
    for name, value in re.findall(r"^(\w+)=([^\s$]+)$", block, re.M):
        block = block.replace(f"${name}", value)
    text = re.sub(r"^#.*|  # .*|^ *\w+=\S+$|\\\n", "", block, flags=re.M)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();<>|&\n")
    lexer.commenters, lexer.whitespace, lexer.whitespace_split = "", " \t", True
    words: list[str] = []
    target, redirected = "", False
    for word in [*lexer, "\n"]:
        if word[0] == ">":
            redirected = True
        elif word[0] in "();<|&\n":
            if words:
                yield words, target
            words, target = [], ""
        elif redirected:
            target, redirected = word, False
        elif words or word not in KEYWORDS:
            words.append(word)


class Reader:
    """Parses the commands of a page in their order in a folder that has the page's files."""

    def __init__(self, page: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
        link_folders(folder)
        for _, name, content in [block for p in (BEFORE.get(page), page) if p for block in blocks(p)]:
            if name:
                (folder / name).write_text(content, encoding="utf-8")
        patch.chdir(folder)
        patch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")  # else a program replaces the process
        self.patch, self.made, self.given = patch, dict[str, list[str]](), dict[str, Any]()
        patch.setattr(PROGRAM.context_class, "invoke", self._record)
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, self._parse(getattr(argparse.ArgumentParser, name)))

    def _record(self, context: Any, *args: Any, **options: Any) -> None:
        self.given |= options

    @staticmethod
    def _parse(original: Any) -> Any:
        def parse(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
            raise Parsed(vars(original(parser, args)))

        return parse

    def block(self, text: str) -> None:
        needs = re.match("# not run: needs (your|the) ", text)
        for words, target in commands(text):
            self.given = {}
            self._command(words)
            for name in READ:
                value = self.given.get(name)
                for path in value if isinstance(value, list) else [value]:
                    known = needs or not isinstance(path, str | Path) or self._exists(str(path))
                    assert known, f"{shlex.join(words)}: reads {path}"
            written = [str(self.given[name]) for name in WRITTEN if self.given.get(name)]
            self.made |= dict.fromkeys([*written, *filter(None, [target])], self.given.get("overrides") or [])

    def _exists(self, path: str) -> bool:
        return Path(path).exists() or any(fnmatch(path, made) or path.startswith(f"{made}/") for made in self.made)

    def _command(self, words: list[str]) -> None:
        program = Path(words[0]).name
        if program == "time":
            self._command([w for w in words[1:] if w != "-v"])
        elif program == "make":
            assert {w for w in words[1:] if "=" not in w} <= TARGETS, words
            self.made |= {"runs/demo": []} if "demo" in words else {}
        elif program == "pytest":
            assert list(wrong_selection(words[1:])) == []
        elif program == "pip":
            assert words[1:3] == ["install", "-e"], words
            assert words[3].strip(".[]") in doctor.EXTRAS, words
        elif program == "distegnn":
            cli.app(words[1:], standalone_mode=False)
            self._config(words[1], dict(self.given))
        elif program.startswith("python"):
            self._python(words[1:])
        else:
            assert program in OTHERS, words

    def _config(self, name: str, given: dict[str, Any]) -> None:
        """Read the config of a subcommand, with its overrides and with its options that stand for keys."""
        overrides, base = list(given.get("overrides") or ()), given.get("config") or given.get("model")
        if base and "=" in str(base):  # --resume RUN KEY=VALUE
            overrides.insert(0, base)
            base = self.given["config"] = None
        overrides += [f"{TYPED[key]}.{key}={given[key]}" for key in TYPED if given.get(key) is not None]
        if given.get("radius") is not None:
            overrides.append(f"data.radius={given['radius']}")
        if base and not Path(base).exists():
            overrides, base = [*self.made.get(str(base), []), *overrides], None
        settings = config.load(base, overrides)
        if name in ("train", "launch") and not given.get("resume"):
            self.given["data"] = settings.data.path or None
            self.made |= {settings.run.dir: []}
        if name == "sweep" and given["file"].exists():
            self.made |= {str(run.folder): [] for run in sweep_config.load(given["file"]).runs}
        if given.get("hosts") and given["hosts"].exists():
            assert hostfile.read_hosts(given["hosts"])

    def _python(self, words: list[str]) -> None:
        script = Path(words[0])
        if script.parts[0] not in ("recipes", "tools"):  # code of the page
            code = words[1] if words[0] == "-c" else script.read_text(encoding="utf-8")
            compile(code, words[0], "exec")
            files = re.findall(r"""['"]([\w.{}]+\.\w+)['"]""", code)
            self.made |= {re.sub(r"{\w+}", "*", file): [] for file in files}
            return
        before = set(sys.modules)
        with self.patch.context() as patch:
            patch.setattr(sys, "argv", words)
            patch.syspath_prepend(str(ROOT / script if script.is_dir() else ROOT / script.parent))
            try:
                if script.name == "hosts.py":  # its command ssh reads no options, so that words may have some
                    runpy.run_path(str(script))["_parser"]().parse_args(words[1:])
                runpy.run_path(str(script), run_name="__main__")
            except Parsed as parsed:
                self.given = parsed.args[0]
            except SystemExit as end:
                self.given = {} if end.code else self.given
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith((str(ROOT / "tools"), str(ROOT / "recipes"), str(Path.cwd()))):
                del sys.modules[name]
        assert self.given, words
        if "overrides" in self.given:  # a recipe's run.py
            config.load(script.parent / "config.yaml", self.given["overrides"])


@pytest.mark.parametrize("page", [p for p in PAGES if shell_blocks(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_are_accepted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(page, tmp_path, monkeypatch)
    for block in [block for p in (BEFORE.get(page), page) if p for block in shell_blocks(p)]:
        reader.block(block)


WRONG = {
    "distegnn trian a.yaml": "No such command 'trian'",
    "distegnn partition a.h5 --parts two": "valid integer",
    "distegnn rollout runs/a --trajectory 0 --out a.vtkhdf": "Missing parameter: steps",
    "distegnn train absent.yaml": "reads absent.yaml",
    "distegnn train recipes/nbody/config.yaml train.lr=fast": "train.lr=fast",
    "distegnn verify tools --model recipes/nbody/config.yaml --halo none": "partition.halo=none",
    "distegnn config train.epochs=2 > a.yaml\ndistegnn train a.yaml train.warmup=2": "train.warmup=2",
    "distegnn import a.csv \\\n    --out a.h5 && distegnn inspect b.h5": "reads a.csv",
    "python tools/bench step --nodes many": "tools/bench",
    "python recipes/nbody/prepare.py --scale huge --out a.h5": "prepare.py",
    "python recipes/nbody/run.py --scale tiny train.epoch=2": "did you mean train.epochs",
    "python tools/emulated_hosts/hosts.py set --delay long": "hosts.py",
    "python absent.py": "absent.py",
    "curl x": "curl",
}


@pytest.mark.parametrize("block", WRONG)
def test_wrong_commands_are_found(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```sh\n# not run: takes minutes\n{block}\n```\n")
    reader = Reader(page, tmp_path, monkeypatch)
    with pytest.raises(Exception, match=re.escape(WRONG[block])):
        reader.block(shell_blocks(page)[0])
