"""The documentation's pages are built without a network, load nothing from elsewhere, and link to
what is there."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None,
    reason="mkdocs is not installed (./run.sh setup --docs installs it)",
)


class Page(HTMLParser):
    """What a page loads, what it links to, and where it can be linked to."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.linked, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if given.get("id"):
            self.anchors.add(given["id"])
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(given["href"])
        if tag == "a" and given.get("href"):
            self.linked.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return {path.relative_to(folder): Page(path.read_text()) for path in folder.rglob("*.html")}


def test_every_page_of_the_project_is_there(site):
    names = {path.stem for path in site}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= names
    assert {"index", "algoperf", "paper", "gallery"} <= names


def test_nothing_is_loaded_from_elsewhere(site):
    for path, page in site.items():
        for target in page.loaded:
            assert not urlsplit(target).netloc, (path, target)


def test_links_inside_the_site_lead_somewhere(site):
    for path, page in site.items():
        if path.name == "404.html":
            continue  # its links are relative to the site's address
        for link in page.linked:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            target = Path(os.path.normpath(target))
            if target.suffix != ".html":
                continue
            assert target in site, (path, link)
            if parts.fragment:
                assert unquote(parts.fragment) in site[target].anchors, (path, link)


def test_the_gallery_has_every_picture(site):
    shown = " ".join(site[Path("gallery.html")].loaded)
    for picture in (ROOT / "docs" / "pictures").glob("*.png"):
        assert picture.name in shown


def test_the_reference_comes_from_docstrings(site):
    anchors = site[Path("api_compare.html")].anchors
    assert "steps_to_target.reading.load.load_runs" in anchors
    assert any(anchor.startswith("submission.kfac") for anchor in site[Path("api.html")].anchors)


@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/**/README.md")],
    ids=str,
)
def test_links_between_files_of_the_project_lead_somewhere(page):
    if {".venv", ".venv-algoperf", "node_modules"} & set(page.parts):
        pytest.skip("not the project's")
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            generated = {"algoperf.md", "paper.md", "gallery.md", "index.md"}
            assert (page.parent / target).exists() or target in generated, target
