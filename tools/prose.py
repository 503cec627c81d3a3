"""Measures the prose of this project: documents, docstrings and comments.

    python tools/prose.py                      # a table of everything
    python tools/prose.py docs csrc/layout     # of some files or folders, with their worst sentences
    python tools/prose.py --check              # exits 1 if anything is beyond the limits

A document is measured alone; source files are measured by folder. Code blocks and headings are left out. A word is
what stands between two spaces and has a letter or digit, and `inline code` is one word. Cells of tables and labels
behind code are held to the longest sentence only.

A fragment is a sentence without a main verb. Only a parser of English could find them all. This finds the common ones:
a sentence that begins with a word of OPENERS and has no verb of the lists below, and, in paragraphs of documents, any
sentence without such a verb. If it is wrong about a verb, add that verb to the list.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The limits, here and nowhere else.
MEAN_WORDS = 18  # of a document or folder; its mean must be below
LONGEST_SENTENCE = 35  # words
LONGEST_PARAGRAPH = 120  # words, in documents

# What is measured, and held by CI.
EVERYTHING = (
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "exllama_ops", "csrc", "benchmarks"),
    *("tools", "tests", "_build_backend", "conftest.py"),
)
PYTHON = (".py",)
CPP = (".cpp", ".h", ".cu", ".cuh")
MARKDOWN = (".md",)


def forms(verbs: str) -> frozenset[str]:
    """The words, and each with the ending of "it does"."""
    found: set[str] = set()
    for verb in verbs.split():
        if verb.endswith("y") and verb[-2] not in "aeiou":
            found |= {verb, verb[:-1] + "ies"}
        elif verb.endswith(("s", "sh", "ch", "x", "o")):
            found |= {verb, verb + "es"}
        else:
            found |= {verb, verb + "s"}
    return frozenset(found)


# A sentence that begins with one of these is looked at.
OPENERS = {"of", "and", "or", "but", "nor", "by", "with", "without", "for", "from", "to", "in", "at", "on"}
OPENERS |= {"as", "than", "like", "unlike", "beside", "besides", "not", "also"}
RELATIVES = re.compile(r"(?:(?:of|by|in|from|to|at|on|for|with|after|before|through) )?(?:which|whose|whom)\b", re.I)
# Each of these begins a clause, whose verb is not the main one.
SUBORDINATORS = {"which", "that", "who", "whose", "whom", "where", "when", "while", "if", "since", "because", "until"}
SUBORDINATORS |= {"unless", "whether"}

# Words that are verbs and nothing else, in the forms that can be a main verb.
SURE_VERBS = forms(
    """
    accept add agree allow apply become begin belong bring choose come compute contain decide depend describe differ
    divide do exceed exist explain find follow get give go happen hold ignore include keep know lead leave let lie
    lose make mean meet multiply obey occur own pay prevent prove provide raise read receive refuse remain replace
    require say see seem select send serve take tell think try understand write
    """
) | forms(
    """
    is are was were isn't aren't wasn't has have had hasn't haven't does did doesn't don't didn't can cannot can't could
    may might must shall should will won't would need made took gave held kept got went came became began brought knew
    said saw told chose found sent lost thought wrote tried understood meant met paid
    """
)
# Words that are verbs in some places and nouns in others.
POSSIBLE_VERBS = forms(
    """
    answer appear arrive ask avoid block bound build call capture cast cause change check collect compare compile
    concern consist convert copy cost count cover create cross cut declare decode define delete deliver detect
    dispatch draw drop edit emulate end enter exchange execute expect export extend fail fall fetch fill fit fix
    fold force forget free freeze fuse gather generate grow guard handle help hide import improve install join jump
    land launch learn link list live load look map mark match matter measure merge mirror mix move multiply name
    note offer open order overflow pack pass pick pin place plan point prefetch prepare print promise propagate
    publish put quantize rank reach rebuild record reduce register release rely rename render repeat report
    represent reproduce reset resolve rest restore return reuse rewrite round run save scale search set share shift
    show shuffle sit skip sort speak spill split stand start state stay step stop store sum support survive test
    throw touch trace train transform treat trust turn type undo unpack update use visit wait walk want warm warn
    watch work wrap
    """
) | forms("built left fell grew threw stood shown ran")

ABBREVIATIONS = re.compile(r"\b(?:e\.g|i\.e|etc|cf|vs|resp|approx|fig)\.$", re.I)


@dataclasses.dataclass
class Sentence:
    path: Path
    line: int
    text: str
    kind: str  # "paragraph" or "cell" of a document, "entry" of Args, "item" of a list, "docstring", "comment", "label"

    @property
    def words(self) -> int:
        return len(words(self.text))

    @property
    def counts(self) -> bool:
        """Whether the mean counts it: labels and cells are short, and would hide long sentences."""
        return self.kind not in ("label", "cell")

    @property
    def is_fragment(self) -> bool:
        if self.kind in ("entry", "label", "cell"):
            return False
        return is_fragment(self.text, every=self.kind == "paragraph")


@dataclasses.dataclass
class Measure:
    """What one document or folder comes to."""

    name: str
    sentences: list[Sentence]
    longest_paragraph: int  # words
    is_document: bool

    @property
    def counted(self) -> list[int]:
        return [sentence.words for sentence in self.sentences if sentence.counts]

    @property
    def mean(self) -> float:
        return sum(self.counted) / len(self.counted) if self.counted else 0.0

    @property
    def share_over_30(self) -> float:
        return sum(count > 30 for count in self.counted) / len(self.counted) if self.counted else 0.0

    @property
    def longest(self) -> int:
        return max((sentence.words for sentence in self.sentences), default=0)

    @property
    def fragments(self) -> list[Sentence]:
        return [sentence for sentence in self.sentences if sentence.is_fragment]

    def faults(self) -> list[str]:
        faults = []
        if self.mean >= MEAN_WORDS:
            faults.append(f"{self.name}: {self.mean:.1f} words a sentence; the mean must be below {MEAN_WORDS}")
        if self.is_document and self.longest_paragraph > LONGEST_PARAGRAPH:
            faults.append(f"{self.name}: a paragraph of {self.longest_paragraph} words; {LONGEST_PARAGRAPH} at most")
        for sentence in self.sentences:
            if sentence.words > LONGEST_SENTENCE:
                faults.append(located(sentence, f"{sentence.words} words, {LONGEST_SENTENCE} at most"))
            if sentence.is_fragment:
                faults.append(located(sentence, "a fragment: no main verb"))
        return faults


# Sentences


def words(text: str) -> list[str]:
    return [word for word in text.split() if any(character.isalnum() for character in word)]


def split_sentences(text: str) -> list[str]:
    """At a full stop, question mark or exclamation mark before a space, but for those of abbreviations."""
    sentences: list[str] = []
    start = 0
    for match in re.finditer(r"[.!?][\"')\]*]*(?=\s|$)", text):
        if not ABBREVIATIONS.search(text[start : match.start() + 1]) or match.end() == len(text):
            sentences.append(text[start : match.end()].strip())
            start = match.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if words(sentence)]


def is_verb(word: str) -> bool:
    return word in SURE_VERBS or word in POSSIBLE_VERBS


def is_fragment(sentence: str, every: bool = False) -> bool:
    """Whether no main verb is found in what begins like a fragment, or, with `every`, in any sentence."""
    if sentence.endswith("?"):
        return False
    tokens = [word.strip("\"'()[]*_,;:.!").lower() for word in words(sentence)]
    tokens = [token for token in tokens if token]
    if len(tokens) < 2:
        return False
    # "is found" is one verb.
    verbs = [
        token for token, before in zip(tokens, ["", *tokens], strict=False) if is_verb(token) and not is_verb(before)
    ]
    sure = sum(token in SURE_VERBS for token in verbs)
    subordinate = sum(token in SUBORDINATORS for token in tokens)
    if RELATIVES.match(sentence):
        return len(verbs) < 2
    if tokens[0] == "of":
        return sure <= subordinate
    if tokens[0] in OPENERS:
        return len(verbs) < max(subordinate, 1)
    return every and len(tokens) > 3 and not verbs


def plain(text: str) -> str:
    """Text without markup: inline code is the one word `code`, links are their texts."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", " ", text)
    text = re.sub(r"``.+?``|`[^`]*`", "code", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"https?://\S+", "code", text)
    return re.sub(r"\*\*(?=\S)(.+?)(?<=\S)\*\*", r"\1", text)


@dataclasses.dataclass
class Paragraph:
    line: int
    kind: str
    text: str

    def sentences(self, path: Path) -> Iterator[Sentence]:
        text = re.sub(r"\s+", " ", plain(self.text)).strip()
        for sentence in split_sentences(text):
            whole = sentence[-1] in ".!?" or len(words(sentence)) > 8
            yield Sentence(path, self.line, sentence, self.kind if whole else "label")


# Paragraphs of each kind of file

ITEM = re.compile(r"\s*(?:[-*+]|\d+\.)\s+")
# A bold start of a paragraph that ends in a stop or colon is a heading.
LEAD = re.compile(r"\*\*[^*]+[.:]\*\*|\*\*[^*]+\*\*:")


def without_lead(text: str) -> str:
    lead = LEAD.match(text)
    return text[lead.end() :] if lead else text


def markdown_paragraphs(text: str) -> Iterator[Paragraph]:
    text = re.sub(r"<!--.*?-->", lambda match: "\n" * match.group().count("\n"), text, flags=re.DOTALL)
    open_paragraph: Paragraph | None = None
    fence = ""
    after_blank = True
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        marker = re.match(r"(```+|~~~+)", stripped)
        if fence:
            fence = "" if marker and stripped.startswith(fence) else fence
            continue
        is_code = line.startswith("    ") and after_blank and not ITEM.match(line)
        after_blank = not stripped or (is_code and after_blank)
        if marker or not stripped or stripped.startswith(("#", "|")) or is_code:
            if open_paragraph:
                yield open_paragraph
            open_paragraph = None
            fence = marker.group(1) if marker else ""
            if stripped.startswith("|") and not re.fullmatch(r"[|\s:-]+", stripped):
                for cell in re.split(r"(?<!\\)\|", stripped.strip("|")):
                    yield Paragraph(number, "cell", cell)
            continue
        stripped = stripped.lstrip("> ")
        if ITEM.match(line):
            if open_paragraph:
                yield open_paragraph
            open_paragraph = Paragraph(number, "item", without_lead(ITEM.sub("", stripped, count=1)))
        elif open_paragraph:
            open_paragraph.text += " " + stripped
        else:
            open_paragraph = Paragraph(number, "paragraph", without_lead(stripped))
    if open_paragraph:
        yield open_paragraph


SECTION = re.compile(r"(Args|Arguments|Returns|Raises|Yields|Attributes|Example|Examples|Note|Notes|Source):\s*$")
ENTRY = re.compile(r"^[\w`*., /|\[\]()-]{1,60}?:\s+")
NO_PROSE = re.compile(r"(?:!|type:|noqa|mypy:|fmt:|ruff:|pragma|clang-format|SPDX|NOLINT|-\*-)")


def text_paragraphs(lines: Iterable[tuple[int, str]], kind: str) -> Iterator[Paragraph]:
    """Paragraphs of a docstring or of a run of comment lines, given without their markers and common indent."""
    open_paragraph: Paragraph | None = None
    section = ""
    after_blank = False
    for number, line in lines:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if SECTION.fullmatch(stripped) and not indent:
            section = stripped.rstrip(":")
            stripped = ""
        elif stripped and not indent:
            section = "" if after_blank else section
        is_entry = bool(section) and indent == 4
        # Indented text is a formula, a picture or a program, unless it goes on with an item or a section. So is a line
        # whose words stand in columns.
        continues = open_paragraph is not None and open_paragraph.kind in ("item", "entry")
        is_code = (indent >= 3 and not section and not continues) or bool(re.search(r"\S {3,}\S", line))
        if not stripped or is_code or section.startswith("Example"):
            if open_paragraph:
                yield open_paragraph
            open_paragraph = None
            after_blank = not stripped
            continue
        after_blank = False
        if ITEM.match(line) or is_entry:
            if open_paragraph:
                yield open_paragraph
            body = ITEM.sub("", stripped, count=1)
            open_paragraph = Paragraph(
                number, "entry" if is_entry else "item", ENTRY.sub("", body) if is_entry else body
            )
        elif open_paragraph:
            open_paragraph.text += " " + stripped
        else:
            open_paragraph = Paragraph(number, kind, stripped)
    if open_paragraph:
        yield open_paragraph


def comment_runs(comments: Iterable[tuple[int, int, bool, str]]) -> Iterator[Paragraph]:
    """Comments as (line, column, alone on its line, text): those that follow one another are one text."""
    run: list[tuple[int, str]] = []
    last = (-1, -1)
    for line, column, alone, text in comments:
        if NO_PROSE.match(text.strip()):
            continue
        if not alone:
            yield Paragraph(line, "label", text)
            continue
        if run and (line, column) != (last[0] + 1, last[1]):
            yield from text_paragraphs(run, "comment")
            run = []
        run.append((line, text.removeprefix(" ")))
        last = (line, column)
    yield from text_paragraphs(run, "comment")


def docstring_lines(text: str, first_line: int) -> list[tuple[int, str]]:
    lines = text.splitlines()
    indents = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    indent = min(indents, default=0)
    return [(first_line + i, line[indent:] if i else line.lstrip()) for i, line in enumerate(lines)]


def python_paragraphs(text: str) -> Iterator[Paragraph]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield from text_paragraphs(docstring_lines(value.value, first.lineno), "docstring")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    yield from comment_runs(
        (token.start[0], token.start[1], not token.line[: token.start[1]].strip(), token.string.lstrip("#"))
        for token in tokens
        if token.type == tokenize.COMMENT
    )


CPP_TOKEN = re.compile(
    r'R"(?P<mark>\w*)\(.*?\)(?P=mark)"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|//[^\n]*|/\*.*?\*/', re.DOTALL
)


def cpp_paragraphs(text: str) -> Iterator[Paragraph]:
    def comments() -> Iterator[tuple[int, int, bool, str]]:
        for match in CPP_TOKEN.finditer(text):
            comment = match.group()
            if not comment.startswith(("//", "/*")):
                continue
            start = match.start()
            column = start - (text.rfind("\n", 0, start) + 1)
            alone = not text[start - column : start].strip()
            first_line = text.count("\n", 0, start) + 1
            if comment.startswith("//"):
                yield first_line, column, alone, comment[2:].lstrip("/").removeprefix("!<")
            else:
                for offset, line in enumerate(comment[2:-2].splitlines()):
                    yield first_line + offset, column, alone, re.sub(r"^\s*\*", "", line)

    yield from comment_runs(comments())


def paragraphs(path: Path) -> Iterator[Paragraph]:
    text = path.read_text()
    if path.suffix in MARKDOWN:
        yield from markdown_paragraphs(text)
    elif path.suffix in PYTHON:
        yield from python_paragraphs(text)
    elif path.suffix in CPP:
        yield from cpp_paragraphs(text)


# Measures


def files_of(names: Iterable[str]) -> list[Path]:
    found: list[Path] = []
    for name in names:
        path = (ROOT / name).resolve()
        if path.is_dir():
            inside = (file for file in sorted(path.rglob("*")) if file.suffix in (*MARKDOWN, *PYTHON, *CPP))
            found += [file for file in inside if not any(part in ("__pycache__", "build") for part in file.parts)]
        elif path.is_file():
            found.append(path)
        else:
            raise SystemExit(f"prose: no such file or folder: {name}")
    return list(dict.fromkeys(found))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def relative_documents(folder: str) -> list[str]:
    """The documents of a folder, as paths from the root of the project."""
    return [relative(path) for path in sorted((ROOT / folder).rglob("*.md"))]


def located(sentence: Sentence, fault: str) -> str:
    return f"{relative(sentence.path)}:{sentence.line}: {fault}: {sentence.text}"


def measure(names: Iterable[str]) -> list[Measure]:
    measures: dict[str, Measure] = {}
    for path in files_of(names):
        is_document = path.suffix in MARKDOWN and "results" not in path.parts
        if path.suffix in MARKDOWN and not is_document:
            continue
        name = relative(path) if is_document or path.parent == ROOT else relative(path.parent)
        group = measures.setdefault(name, Measure(name, [], 0, is_document))
        for paragraph in sorted(paragraphs(path), key=lambda paragraph: paragraph.line):
            sentences = list(paragraph.sentences(path))
            group.sentences += sentences
            if paragraph.kind != "cell":
                count = sum(sentence.words for sentence in sentences)
                group.longest_paragraph = max(group.longest_paragraph, count)
    return list(measures.values())


def table(measures: list[Measure]) -> str:
    rows = [("", "sentences", "mean", "over 30", "longest", "paragraph", "fragments")]
    for group in measures:
        rows.append(
            (
                group.name,
                str(len(group.counted)),
                f"{group.mean:.1f}",
                f"{group.share_over_30:.0%}",
                str(group.longest),
                str(group.longest_paragraph),
                str(len(group.fragments)),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures the prose of documents, docstrings and comments.")
    parser.add_argument("paths", nargs="*", help="files or folders; everything without any")
    parser.add_argument("--check", action="store_true", help="exit 1 beyond the limits")
    parser.add_argument("--worst", type=int, default=10, metavar="N", help="print the N worst sentences (10)")
    options = parser.parse_args(arguments)
    if options.check:
        faults = [fault for group in measure(options.paths or EVERYTHING) for fault in group.faults()]
        print(*faults, sep="\n", end="\n" if faults else "")
        return 1 if faults else 0
    measures = measure(options.paths or EVERYTHING)
    print(table(measures))
    sentences = [sentence for group in measures for sentence in group.sentences]
    for sentence in sorted(sentences, key=lambda sentence: -sentence.words)[: options.worst]:
        print(located(sentence, f"{sentence.words} words"))
    fragments = [sentence for sentence in sentences if sentence.is_fragment]
    for sentence in fragments[: options.worst]:
        print(located(sentence, "a fragment"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
