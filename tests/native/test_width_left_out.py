"""A bit width that a table of the C++ lacks does not compile, and the compiler names the table.

The width is 6, which no checkpoint has. A copy of csrc gets it in every table, or in every table but one.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-pthread", "-ffp-contract=off"]


class Table(NamedTuple):
    """A place that a new width needs.

    Args:
        file: in csrc.
        before: what stands there.
        after: the same with 6 bits.
        refusal: what the compiler says where the width is not in it.
    """

    file: str
    before: str
    after: str
    refusal: str


# 16 values of 6 bits are 3 words. Each half of a word has two whole values and 4 bits of the last four.
WIDTHS = ("layout/formats.h", "kWidths[] = {2, 3, 4, 8};", "kWidths[] = {2, 3, 4, 6, 8};")
TABLES = {
    "shuffled order": Table(
        "layout/formats.h",
        "  return -1;\n",
        "  if (bits != 6) return -1;\n"
        "  if (j < 12) return 32 * (j / 4) + 6 * (j % 4 / 2) + 16 * (j % 2) + b;\n"
        "  return 32 * (b / 2) + 12 + (j - 12) / 2 * 2 + 16 * (j % 2) + b % 2;\n",
        "csrc/layout has no shuffled order of a width in kWidths: add it to shuffled_position in formats.h",
    ),
    "order of quads": Table(
        "cpu/kernels.h",
        "  if (bits == 3) return 4 * quad",
        "  if (bits == 3 || bits == 6) return 4 * quad",
        "csrc/cpu has no order of quads of a width in kWidths: add it to quad_order in kernels.h",
    ),
    "pairs": Table(
        "cpu/generic/words-inl.h",
        "  } else if constexpr (bits == 2 || bits == 4) {\n    const int field = bits == 4 ? 0x000f000f",
        "  } else if constexpr (bits == 6) {\n"
        "    if (p < 6) return bit_and(shift_right(words[p / 2], p % 2 * 6), set_int(0x003f003f));\n"
        "    Int value = set_int(0);\n"
        "    for (int w = 0; w < 3; ++w) {\n"
        "      const Int part = bit_and(shift_right(words[w], 12 + (p - 6) * 2), set_int(0x00030003));\n"
        "      value = bit_or(value, shift_left(part, 2 * w));\n"
        "    }\n"
        "    return value;\n"
        "  } else if constexpr (bits == 2 || bits == 4) {\n    const int field = bits == 4 ? 0x000f000f",
        "csrc/cpu has no unpacking of this bit width: add it to pair_of in words-inl.h",
    ),
    "quads": Table(
        "cpu/generic/words-inl.h",
        "  } else if constexpr (bits == 3) {\n    return bit_or(pair_of",
        "  } else if constexpr (bits == 3 || bits == 6) {\n    return bit_or(pair_of",
        "csrc/cpu has no quads of this bit width: add them to quad_of in words-inl.h",
    ),
    "bytes of floats": Table(
        "cpu/generic/float-words-inl.h",
        "  } else if constexpr (bits == 3) {\n    return pair_of",
        "  } else if constexpr (bits == 3 || bits == 6) {\n    return pair_of",
        "csrc/cpu has no floats of this bit width: add it to bytes_of_pair in float-words-inl.h",
    ),
}


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    for folder in ("layout", "cpu"):
        shutil.copytree(ROOT / "csrc" / folder, tmp_path / folder)
    _replace(tmp_path, *WIDTHS)
    return tmp_path


@pytest.mark.parametrize("left_out", TABLES)
def test_a_width_that_a_table_lacks_is_refused_by_name(left_out: str, csrc: Path) -> None:
    for name, table in TABLES.items():
        if name != left_out:
            _replace(csrc, table.file, table.before, table.after)
    sources = [csrc / "cpu" / "isa" / "avx2" / name for name in ("kernels.cpp", "float_words.cpp")]
    command = ["g++", *FLAGS, "-fsyntax-only", "-I", csrc, *sources]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    refusals = [name for name, table in TABLES.items() if table.refusal in result.stderr]
    assert refusals == [left_out], result.stderr


@pytest.mark.slow
def test_a_width_in_every_table_computes_what_sums_in_double_say(csrc: Path) -> None:
    for table in TABLES.values():
        _replace(csrc, table.file, table.before, table.after)
    sources = [ROOT / "tests" / "native" / "test_cpu.cpp", *sorted((csrc / "cpu").rglob("*.cpp"))]
    program = csrc / "test_cpu"
    subprocess.run(["g++", "-O1", *FLAGS, "-I", csrc, *sources, "-o", program], check=True)
    result = subprocess.run([program, "sampled", "6"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert " 0 failures" in result.stdout


def _replace(csrc: Path, file: str, before: str, after: str) -> None:
    text = (csrc / file).read_text()
    assert text.count(before) == 1, f"{file} has changed, and this test with it: {before!r}"
    (csrc / file).write_text(text.replace(before, after))
