"""Markdown as tests read it: fenced blocks with the notes above them, code in the text, links and their aims.

A note is an HTML comment directly above a block, which readers of the page do not see:

    <!-- not run: why -->                            nothing of the block is run
    <!-- not run (curl, vllm-edits serve): why -->   commands of it that begin so are only read
    <!-- file: milder.yaml -->                       it is a file of that name, which commands of any page find
    <!-- begins anew -->                             what blocks above it did is forgotten, but in a bucket
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markdown_it import MarkdownIt
from markdown_it.token import Token

_PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
_COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
_NOT_RUN = re.compile(r"not run\b\s*(?:\((?P<commands>[^)]*)\))?\s*:?\s*(?P<why>.*)", re.DOTALL)
_FILE = re.compile(r"file:\s*(?P<name>\S+)")
_TARGET = re.compile(r"""(?:href|src)\s*=\s*["']([^"']+)["']""", re.IGNORECASE)
_HTML_ANCHOR = re.compile(r"""(?:id|name)\s*=\s*["']([^"']+)["']""", re.IGNORECASE)


@dataclass(frozen=True)
class Note:
    """What a comment above a block says of it."""

    line: int
    kind: Literal["not run", "file", "begins anew"]
    text: str = ""
    """the reason, or the file's name"""
    commands: tuple[str, ...] = ()
    """beginnings of the commands that are meant; without any it is the whole block"""


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is that of its first line of text."""

    line: int
    language: str
    text: str
    notes: tuple[Note, ...] = ()

    def said(self, kind: str) -> list[Note]:
        return [note for note in self.notes if note.kind == kind]


@dataclass(frozen=True)
class Piece:
    """A link's target, or code within the text."""

    line: int
    text: str


@dataclass
class Page:
    """A Markdown file. `path` is relative to the repository."""

    path: str
    text: str
    blocks: list[Block] = field(default_factory=list)
    code: list[Piece] = field(default_factory=list)
    links: list[Piece] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    astray: list[Note] = field(default_factory=list)
    """notes that stand above no block"""

    @classmethod
    def read(cls, path: str, text: str) -> Page:
        page = cls(path, text)
        page._take(_PARSER.parse(text))
        return page

    def _take(self, tokens: Sequence[Token]) -> None:
        notes: list[Note] = []
        slugs: Counter[str] = Counter()
        for token, following in zip(tokens, [*tokens[1:], None], strict=True):
            if token.type == "html_block":
                notes += _notes(token)
                self._take_html(token.content, _line(token))
                continue
            if token.type in ("fence", "code_block"):
                self.blocks.append(Block(_line(token) + (token.type == "fence"), token.info.strip(), token.content,
                                         tuple(notes)))  # fmt: skip
            else:
                self.astray += notes
            notes = []
            if token.type == "heading_open" and following is not None:
                slug = _slug(following)
                self.anchors.add(f"{slug}-{slugs[slug]}" if slugs[slug] else slug)
                slugs[slug] += 1
            if token.type == "inline":
                self._take_inline(token)
        self.astray += notes

    def _take_inline(self, token: Token) -> None:
        for child in token.children or ():
            if child.type == "code_inline":
                self.code.append(Piece(self._where(token, child.content), child.content))
            elif child.type in ("link_open", "image"):
                target = str(child.attrs.get("href" if child.type == "link_open" else "src"))
                self.links.append(Piece(self._where(token, target), target))
            elif child.type == "html_inline":
                self._take_html(child.content, self._where(token, child.content))

    def _take_html(self, text: str, line: int) -> None:
        text = _COMMENT.sub("", text)
        self.links += [Piece(line, target) for target in _TARGET.findall(text)]
        self.anchors |= set(_HTML_ANCHOR.findall(text))

    def _where(self, token: Token, text: str) -> int:
        """The first line of a paragraph that holds the beginning of a text."""
        begin, end = token.map or (0, 0)
        lines = self.text.splitlines()[begin:end]
        first = text.partition(" ")[0]
        return begin + 1 + next((number for number, line in enumerate(lines) if text in line or first in line), 0)


def _line(token: Token) -> int:
    return (token.map or [0])[0] + 1


def _slug(heading: Token) -> str:
    """The anchor that GitHub gives a heading, before equal ones are numbered."""
    text = "".join(child.content for child in heading.children or () if child.type in ("text", "code_inline"))
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def _notes(token: Token) -> Iterator[Note]:
    for match in _COMMENT.finditer(token.content):
        line = _line(token) + token.content[: match.start()].count("\n")
        said = " ".join(match[1].split())
        if found := _NOT_RUN.match(said):
            commands = tuple(each.strip() for each in (found["commands"] or "").split(",") if each.strip())
            yield Note(line, "not run", found["why"], commands)
        elif found := _FILE.fullmatch(said):
            yield Note(line, "file", found["name"])
        elif said == "begins anew":
            yield Note(line, "begins anew")
