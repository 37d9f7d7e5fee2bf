"""For MkDocs (hooks in mkdocs.yml): pages for the files of the repository that the documentation links to.

A link from docs/ to `../torchtitan/train.py` works in a checkout; on the site it leads to a page that shows
the file. Links of such pages are followed too, so the README and the results of benchmarks are on the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")
LANGUAGES = {".py": "python", ".sh": "bash", ".slurm": "bash", ".toml": "toml"}


def linked(path: str, text: str) -> set[str]:
    """Files outside docs/ that the Markdown of `path` links to, by their paths in the repository."""
    found = {
        posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for _, link, _ in LINK.findall(text)
    }
    return {name for name in found if not name.startswith("docs/") and (REPOSITORY / name).is_file()}


def place(path: str) -> str:
    """Where a file of the repository stands in the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def content(path: str) -> str:
    """A page that shows a file."""
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n````\n"


def origin(page: str) -> str:
    """The inverse of `place`."""
    if not page.startswith("source/"):
        return f"docs/{page}"
    path = page.removeprefix("source/")
    return path if (REPOSITORY / path).is_file() else path.removesuffix(".md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that the others lead to."""
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    waiting, seen = set().union(*(linked(path, text) for path, text in texts.items())), set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        files.append(File.generated(config, place(path), content=content(path)))
        if path.endswith(".md"):
            waiting |= linked(path, content(path)) - seen
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository become links to their pages."""
    here = page.file.src_uri
    folder = posixpath.dirname(origin(here))

    def move(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if not (REPOSITORY / path).is_file():
            return match[0]
        return match[1] + posixpath.relpath(place(path), posixpath.dirname(here) or ".") + match[3]

    return LINK.sub(move, markdown)
