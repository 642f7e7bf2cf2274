"""Pages of the site that have their source elsewhere: the README, results/, and the commands.

The home page is the README and the results are those of results/, so that nothing is written twice.
The page of the commands is what ``l2rec COMMAND --help`` says.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.main import get_command

from l2rec.cli import app

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    pages = {"index.md": (ROOT / "README.md").read_text(), "commands.md": commands()}
    written = (ROOT / "results").rglob("*.md")
    pages |= {p.relative_to(ROOT).as_posix(): p.read_text() for p in written}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(text: str, page: Page, config: Any, files: Files) -> str:
    """Turn links within the repository into links within the site; where there is no page, into
    their text.
    """
    here = page.file.src_uri
    source = "README.md" if here == "index.md" else here if _of_results(here) else f"docs/{here}"

    def link(found: re.Match[str]) -> str:
        image, words, target, place = found.groups()
        if image or re.match(r"\w+:", target):
            return found.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        uri = "index.md" if path == "README.md" else path.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            if not (ROOT / path).exists():
                raise SystemExit(f"{source}: no {path}, which it links to")
            return words
        start = posixpath.dirname(here) or "."
        return f"[{words}]({posixpath.relpath(uri, start)}{place or ''})"

    if here == "index.md":  # the pictures of the README, which are HTML, lie beside its pages here
        text = re.sub(r'(src|srcset)="docs/', r'\1="', text)
    return LINK.sub(link, text)


def _of_results(uri: str) -> bool:
    return uri.startswith("results/")


def commands() -> str:
    """Return a page with the help of every command."""
    lines = ["# Commands", "", "What `l2rec COMMAND --help` says."]
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        arguments = [str(p.name).upper() for p in command.params if _is_argument(p)]
        lines += ["", f"## {name}", "", f"`{' '.join(['l2rec', name, *arguments])} [OPTIONS]`"]
        lines += ["", _prose(command.help or ""), "", "| | | default |", "|---|---|---|"]
        lines += [_row(p) for p in command.params if not getattr(p, "hidden", False)]
    return "\n".join(lines) + "\n"


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _prose(help: str) -> str:
    paragraphs = help.replace("\b", "").strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _row(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if _is_argument(parameter):
        names = f"`{str(parameter.name).upper()}`"
    default = parameter.default
    plain = isinstance(default, (str, int, float)) and not isinstance(default, bool)
    shown = f"`{default}`" if plain else "required" if parameter.required else ""
    words = " ".join(str(parameter.help or "").split()).replace("|", "\\|")
    return f"| {names} | {words} | {shown} |"
