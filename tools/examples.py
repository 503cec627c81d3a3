"""Runs the Python examples of documents: ``python tools/examples.py README.md docs``.

The ```python blocks of a page are run in their order, in one module. A comment `# prints: TEXT` says a line that the
block prints, and all that a block prints must be said. `# prints: ...` stands for the rest. A block whose fence says
```python not-run is only compiled: it needs a GPU or a model. pytest collects the pages through conftest.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

FENCE = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTS = re.compile(r"^\s*# prints: ?(.*)$", re.MULTILINE)

# Dynamo looks for names in a module when a compiled function is collected: a page's module is never given up.
_modules: list[types.ModuleType] = []


class ExampleError(AssertionError):
    """An example printed something else than the page says."""


@dataclasses.dataclass(frozen=True)
class Example:
    path: Path
    line: int  # of its first line of code
    code: str
    runs: bool

    @property
    def says(self) -> list[str]:
        return [line.rstrip() for line in PRINTS.findall(self.code)]

    def compile(self) -> types.CodeType:
        # Blank lines give the code the line numbers of the page, in tracebacks and for inspect.
        return compile("\n" * (self.line - 1) + self.code, str(self.path), "exec")

    def run(self, module: types.ModuleType) -> None:
        code = self.compile()
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, vars(module))
        printed = [line.rstrip() for line in output.getvalue().splitlines()]
        says = self.says
        if says and says[-1] == "...":
            says[-1:] = printed[len(says) - 1 :] or ["at least one line"]
        if printed != says:
            raise ExampleError(f"{self.path}:{self.line}: the page says {self.says}; the example printed {printed}")


def examples(path: Path) -> Iterator[Example]:
    text = path.read_text()
    for match in FENCE.finditer(text):
        options = match["options"].split()
        if unknown := [option for option in options if option != "not-run"]:
            raise ValueError(f"{path}: ```python takes no option but not-run; got {unknown}")
        yield Example(path, text.count("\n", 0, match.start("code")) + 1, match["code"], not options)


def run_page(path: Path) -> int:
    """Run the examples of a page, and say how many there were."""
    module = types.ModuleType(f"example_{path.stem.replace('-', '_')}")
    module.__file__ = str(path)
    _modules.append(module)
    sys.modules[module.__name__] = module
    count = 0
    for example in examples(path):
        if example.runs:
            example.run(module)
            count += 1
        else:
            example.compile()
    return count


def main(names: list[str]) -> int:
    paths = [Path(name) for name in names]
    pages = [page for path in paths for page in (sorted(path.rglob("*.md")) if path.is_dir() else [path])]
    for page in pages:
        print(f"{page}: {run_page(page)} examples")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
