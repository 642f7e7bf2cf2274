"""The commands that the documents show, collected: blocks of code, and spans between backticks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.data.synthetic import COLOURS, MATERIALS, THINGS

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "GOVERNANCE.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "README.md",
)
PROGRAMS = (
    *("l2rec", "python", "make", "pip", "pytest", "curl", "torchrun", "accelerate"),
    *("docker", "hf"),
)
"""What a command begins with."""
SHELL = "bash"
"""Language of the blocks that are commands."""

KINDS = ("Comedy", "Drama", "Sci-Fi", "Action")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|\.\.\.|…")
_ENDS = {"&&", ";", "|", "||"}


class Block(NamedTuple):
    """A fenced block: its language ("" for none), its text, and the line it begins on."""

    language: str
    text: str
    line: int


class Command(NamedTuple):
    """A command as its words, and where it stands. ``whole``: in a block, to be typed as it is;
    a span in a sentence may leave out what the sentence says, such as the folder.
    """

    words: tuple[str, ...]
    where: str
    whole: bool


def blocks(document: Path) -> list[Block]:
    """Find the fenced blocks of a document."""
    text = document.read_text()
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start()) + 1)
        for found in _FENCE.finditer(text)
    ]


def commands(document: Path) -> Iterator[Command]:
    """Yield every command of a document: all of its blocks for a shell, and between backticks what
    begins with a program.
    """
    for block in blocks(document):
        if block.language == SHELL:
            for words in of_shell(block.text):
                yield Command(words, f"{document.name}:{block.line}", True)
    prose = _FENCE.sub(lambda found: "\n" * found[0].count("\n"), document.read_text())
    yield from spans(prose, document.name)


def spans(prose: str, name: str) -> Iterator[Command]:
    """Yield what stands between backticks and begins with a program."""
    for span in _SPAN.finditer(prose):
        if span[1].split()[0] in PROGRAMS and " " in span[1]:
            line = prose.count("\n", 0, span.start()) + 1
            for words in of_shell(span[1].replace("\n", " ")):
                yield Command(words, f"{name}:{line}", False)


def of_shell(script: str) -> Iterator[tuple[str, ...]]:
    """Yield the simple commands of a script as their words. Variables that it sets are filled in;
    of a loop, the first round is taken.
    """
    variables: dict[str, str] = {}
    for line in _lines(script):
        for words in _simple(line):
            if words[0] == "for":
                variables[words[1]] = words[3]
                continue
            words = words[1:] if words[0] == "do" else words
            if not words or words[0] == "done":
                continue
            if found := re.fullmatch(r"(\w+)=(\S*)", words[0]):
                variables[found[1]] = found[2]
                continue
            yield tuple(_filled(word, variables) for word in words)


def placeholder(word: str) -> bool:
    """Tell whether a word stands for what the reader puts there: DATA, RUN, three dots."""
    return any(_PLACEHOLDER.fullmatch(part) for part in re.split(r"[=/]", word))


def films(folder: Path) -> Path:
    """Write a small data set with the ids and the fields of MovieLens, in RecBole's files:
    data/ml-100k.
    """
    source, draw = folder / "source", np.random.default_rng(0)
    source.mkdir(parents=True)
    titles = list(product(COLOURS, MATERIALS, THINGS))  # words of the tiny tokenizer: no two alike
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for item in range(1, 201):
        kinds = " ".join(dict.fromkeys(KINDS[k] for k in (item % 4, item % 3)))
        items.append(f"{item}\t{' '.join(titles[item])}\t{1990 + item % 9}\t{kinds}")
    events = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(1, 51):
        for time, item in enumerate(draw.integers(1, 201, 8)):
            events.append(f"{user}\t{item}\t{8e8 + 100 * time + user}")
    (source / "x.item").write_text("\n".join(items) + "\n")
    (source / "x.inter").write_text("\n".join(events) + "\n")
    config = PrepareConfig(text="{movie_title} ({release_year}), {class}", keep_all_items=True)
    return prepare(source, folder / "data" / "ml-100k", config, progress=False).path


def _filled(word: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        word = re.sub(rf"\$(?:{name}\b|{{{name}}})", lambda _, value=value: value, word)
    return word


def _lines(script: str) -> Iterator[str]:
    """Join what goes over several lines: after a backslash, and within quotes."""
    command = ""
    for line in script.splitlines():
        command += line
        try:
            shlex.split(command, comments=True)
        except ValueError:  # within quotes, or a backslash at the end
            command = command[:-1] if command.endswith("\\") else f"{command}\n"
            continue
        yield command
        command = ""
    assert not command.strip(), command


def _simple(line: str) -> Iterator[list[str]]:
    """Split a line where a command ends."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in _ENDS:
            words.append(word)
        elif words:
            yield words
            words = []
