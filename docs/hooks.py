"""Makes pages of Markdown that lies elsewhere in the project, and of the pictures."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Page of the site -> file of the project.
PAGES = {
    "index.md": "README.md",
    "algoperf.md": "workloads_overrides/README.md",
    "paper.md": "workloads_overrides/paper/README.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not in docs/."""
    for page in (*PAGES, "gallery.md"):
        content = _gallery() if page == "gallery.md" else (ROOT / PAGES[page]).read_text("utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links at the site's pages; those to other files of the project become plain text."""
    source = page.file.src_uri
    folder = (ROOT / PAGES.get(source, f"docs/{source}")).parent
    pages = {(ROOT / path).resolve(): name for name, path in PAGES.items()}

    def rewritten(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups(default="")
        if "://" in target or files.get_file_from_path(target):
            return match[0]
        path = (folder / target).resolve()
        if path in pages:
            return f"{mark}[{text}]({pages[path]}{anchor})"
        if path.is_relative_to(ROOT / "docs"):
            return f"{mark}[{text}]({path.relative_to(ROOT / 'docs').as_posix()}{anchor})"
        if not path.exists():
            return match[0]  # a dead link, which the build reports
        return f"{text} (`{path.relative_to(ROOT).as_posix()}`)"

    return _LINK.sub(rewritten, markdown)


def _gallery() -> str:
    """All pictures, each with the words that the pages show it with."""
    said: dict[str, tuple[str, str]] = {}
    for page in sorted((ROOT / "docs").glob("*.md")):
        for text, target in re.findall(
            r"!\[([^\]]*)\]\((pictures/[^)]+)\)", page.read_text("utf-8")
        ):
            said.setdefault(target, (text, page.name))
    parts = ["# Gallery\n"]
    for picture in sorted((ROOT / "docs" / "pictures").glob("*.png")):
        target = f"pictures/{picture.name}"
        text, page = said.get(target, (picture.stem.replace("_", " "), ""))
        parts.append(f"## {text[:1].upper()}{text[1:]}\n")
        parts.append(f"![{text}]({target})\n")
        if page:
            parts.append(f"From [{page.removesuffix('.md')}]({page}).\n")
    return "\n".join(parts)
