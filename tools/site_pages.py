"""A hook of mkdocs: pages from outside docs/ join the site, and links between all pages are adapted to it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = [*sorted(ROOT.glob("recipes/*/README.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)]*)?(\))")  # without a scheme, and not within the page


def on_files(files: Any, config: Any) -> Any:
    """Add the pages at the same path as in the repository."""
    for page in OUTSIDE:
        files.append(File.generated(config, page.relative_to(ROOT).as_posix(), abs_src_path=str(page)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links of the repository as links of the site, where docs/ is the root."""
    source = Path(page.file.abs_src_path).relative_to(ROOT)

    def in_site(path: str) -> str:
        return path.removeprefix("docs/")

    def adapt(link: re.Match[str]) -> str:
        target = os.path.normpath(source.parent / link[2])
        changed = os.path.relpath(in_site(target), os.path.dirname(in_site(str(source))) or ".")
        return f"{link[1]}{changed}{link[3] or ''}{link[4]}"

    return LINK.sub(adapt, markdown)
