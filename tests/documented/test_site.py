"""The site builds without a warning, and each of its links leads somewhere."""

import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests.documented.pages import REPOSITORY


class Anchors(HTMLParser):
    """The links of a page, what it embeds, and the places that a link may name."""

    def __init__(self, file: Path):
        super().__init__()
        self.links, self.names = set[str](), {""}
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.names |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag != "link" or values.get("rel") != "canonical":
            self.links |= {values[name] for name in ("href", "src") if values.get(name)}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[tuple[Path, list[str]]]:
    """Where it was built, and what was said meanwhile."""
    folder, said = tmp_path_factory.mktemp("site"), []

    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(listener)
    config = load_config(str(REPOSITORY / "mkdocs.yml"), site_dir=str(folder), strict=False)
    build(config)
    logging.getLogger("mkdocs").removeHandler(listener)
    return folder, said


def test_the_site_builds_without_a_warning(site):
    folder, said = site
    assert said == [] and (folder / "index.html").is_file()


def test_every_link_of_the_site_leads_somewhere(site):
    folder, _ = site
    pages = {file: Anchors(file) for file in folder.rglob("*.html")}
    wrong = set()
    for page, anchors in pages.items():
        for link in anchors.links:
            path, name = urldefrag(unquote(link))
            if re.match(r"https://[\w.-]+\.\w+(/|$)|data:|mailto:", link):
                continue
            start = folder if path.startswith("/") else page.parent  # 404.html may be shown anywhere
            target = (start / path.removeprefix("/")).resolve() if path else page
            known = target.is_file() and (target not in pages or name in pages[target].names)
            if not known:
                wrong.add((page.relative_to(folder).as_posix(), link))
    assert len(pages) > 20 and wrong == set()


def test_every_page_is_in_the_navigation(site):
    named = set(re.findall(r"[\w/]+\.md", (REPOSITORY / "mkdocs.yml").read_text()))
    assert named == {
        page.relative_to(REPOSITORY / "docs").as_posix() for page in (REPOSITORY / "docs").rglob("*.md")
    }
