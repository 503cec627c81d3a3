"""tools/prose.py finds what is planted, and leaves alone what is no prose."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import prose

LONG = "word " * 35 + "end."
DOCUMENT = f"""# A heading of no interest

The first sentence has six words. The second, with `some inline code`, has seven.

```sh
{LONG}
```

- {LONG}

| cell | {LONG} |
|---|---|

Of a kernel, from the end of the one before it.

    {LONG}
"""
PYTHON = '''"""A docstring. Its second sentence is longer.

    W[k, n] = scales[g, n] * (q[k, n] - z[g, n])

Args:
    x: (M, K), of any dtype.
"""

# By which the columns are sorted.
#   picture   of   words
VALUE = 1  # of a label
TEXT = "# Of no comment."
'''
CPP = """// Of one row, in turns; with no verb.
// This line is another sentence of the same comment.
const char *text = "// Of no comment.";  /* a label */
const int big = 1'000'000;  // the separators open no string
/* Adds a row.
 * Returns nothing. */
"""


def measure(tmp_path: Path, name: str, text: str) -> prose.Measure:
    path = tmp_path / name
    path.write_text(text)
    (measured,) = prose.measure([str(path)])
    return measured


def fragments(measured: prose.Measure) -> list[str]:
    return [sentence.text for sentence in measured.fragments]


def test_a_document_is_measured_by_its_sentences(tmp_path: Path) -> None:
    measured = measure(tmp_path, "page.md", DOCUMENT)
    assert measured.counted == [6, 6, 36, 11]
    assert [(sentence.line, sentence.kind) for sentence in measured.sentences if sentence.words == 36] == [
        (9, "item"),
        (11, "cell"),
    ]
    assert fragments(measured) == ["Of a kernel, from the end of the one before it."]


def test_docstrings_and_comments_of_python_are_measured(tmp_path: Path) -> None:
    measured = measure(tmp_path, "code.py", PYTHON)
    assert [sentence.text for sentence in measured.sentences if sentence.kind == "docstring"] == [
        "A docstring.",
        "Its second sentence is longer.",
    ]
    assert fragments(measured) == ["By which the columns are sorted."]
    assert [sentence.text for sentence in measured.sentences if sentence.kind == "label"] == ["of a label"]


def test_comments_of_cpp_are_measured(tmp_path: Path) -> None:
    measured = measure(tmp_path, "code.h", CPP)
    assert [sentence.text for sentence in measured.sentences] == [
        "Of one row, in turns; with no verb.",
        "This line is another sentence of the same comment.",
        "a label",
        "the separators open no string",
        "Adds a row.",
        "Returns nothing.",
    ]
    assert len(fragments(measured)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Of one of as many calls; after one that is not timed, whose code the kinds before have displaced.",
        "Of a kernel, from the end of the one before it: some two microseconds.",
        "Of 8 loads, which all at once need too many registers: transposed on sm_120.",
        "By which the table is found.",
        "And for every width.",
        "With the columns of all parts.",
    ],
)
def test_fragments_are_found(text: str) -> None:
    assert prose.is_fragment(text)


@pytest.mark.parametrize(
    "text",
    [
        "Of the two, the first is faster.",
        "By default the kernel loads one row.",
        "With the exponent of 2^23, the bits of an integer are that integer as a float.",
        "And the last one is empty.",
        "Which of the two is it?",
        "For each row that has an outlier the kernel adds a second integer.",
    ],
)
def test_whole_sentences_are_no_fragments(text: str) -> None:
    assert not prose.is_fragment(text)


def test_a_label_of_a_paragraph_without_any_verb_is_a_fragment_in_documents_alone(tmp_path: Path) -> None:
    text = "Value j at bit 4 of the word."
    assert fragments(measure(tmp_path, "page.md", text)) == [text]
    assert fragments(measure(tmp_path, "code.h", f"// {text}\n")) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (LONG, "36 words, 35 at most"),
        ("This sentence is repeated. " * 31, "a paragraph of 124 words"),
        (
            "This is one more of the sentences that are a little longer than the mean of all may ever be. " * 2,
            "the mean",
        ),
        ("Of a kernel, and no more.", "a fragment"),
    ],
)
def test_check_fails_beyond_each_limit(tmp_path: Path, text: str, fault: str, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "page.md"
    page.write_text(text + "\n")
    assert prose.main(["--check", str(page)]) == 1
    assert fault in capsys.readouterr().out


def test_check_passes_what_is_within_the_limits(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("This page is short. It says what it means.\n")
    assert prose.main(["--check", str(page)]) == 0


def test_everything_is_within_the_limits(capsys: pytest.CaptureFixture) -> None:
    assert prose.main(["--check"]) == 0, capsys.readouterr().out
