"""The documents say what is: links lead somewhere, commands exist, examples run, and prose keeps its limits."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from exllama_ops import cli
from structure.test_imports import PARTS
from tools import examples, prose

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", *prose.relative_documents("docs"))
DOCUMENTS = (*PAGES, "benchmarks/README.md", "tests/README.md", "tests/data/README.md", "tools/ptx_emulator/README.md")


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def commands(document: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", text_of(document), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    here = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = here.parent / name if name else here
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_readme_is_short_and_begins_with_the_two_commands() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 150
    assert {"make demo", "make test"} <= set(commands("README.md"))
    assert lines.index("make demo") < 30


def test_ci_runs_the_commands_of_the_readme() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ("make demo", "make test"):
        assert re.search(rf"^{command}\b", ci, re.MULTILINE), command


def test_commands_that_may_install_torch_name_its_version() -> None:
    sources = [(document, line) for document in DOCUMENTS for line in commands(document)]
    sources += [(name, line) for name in (".ci/run", ".ci/slow") for line in text_of(name).splitlines()]
    for source, line in sources:
        installs = re.search(r"pip install(?!.*--no-deps)", line)
        assert not installs or "torch==2.13.0" in line, f"{source}: {line}"
    assert re.search(r"^TORCH \?= torch==2\.13\.0$", text_of("Makefile"), re.MULTILINE)
    for line in text_of("Makefile").splitlines():
        assert not re.match(r"\t.*\$\(PIP\)", line) or "$(PIP) $(TORCH)" in line, line


def test_the_commands_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    for document in DOCUMENTS:
        for line in commands(document):
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                del words[0]
            if not words:
                continue
            if words[0] == "make":
                assert words[1] in targets, f"{document}: {line}"
            elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks"):
                assert (ROOT / (words[2].replace(".", "/") + ".py")).exists(), f"{document}: {line}"
            elif words[0] == "python" and words[1].endswith(".py"):
                assert (ROOT / words[1]).exists(), f"{document}: {line}"
            elif words[0].startswith(".ci/"):
                assert (ROOT / words[0]).exists(), f"{document}: {line}"


def test_the_command_line_of_the_documents_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `exllama-ops` line parses; nothing is run."""
    parsed: list[str] = []
    for command in cli._COMMANDS:
        monkeypatch.setattr(command, command.__name__.rpartition(".")[2], lambda args: parsed.append(args))
    lines = [line for document in DOCUMENTS for line in commands(document) if line.startswith("exllama-ops ")]
    for line in lines:
        assert cli.main(shlex.split(line)[1:]) == 0, line
    assert len(parsed) == len(lines) > 3


def test_the_options_of_run_are_documented(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    options = set(re.findall(r"(--[a-z-]+)", capsys.readouterr().out)) - {"--help"}
    assert options == set(re.findall(r"^\| `(--[a-z-]+)", text_of("docs/models.md"), re.MULTILINE))


def write_page(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


def test_examples_share_a_page_and_must_print_what_they_say(tmp_path: Path) -> None:
    page = write_page(tmp_path, "```python\nx = 1\n```\n\n```python\nprint(x)\n# prints: 1\n```\n")
    assert examples.run_page(page) == 2
    page = write_page(tmp_path, "```python\nprint(2)\n# prints: 1\n```\n")
    with pytest.raises(examples.ExampleError, match=r"page.md:2: the page says \['1'\]; the example printed \['2'\]"):
        examples.run_page(page)
    with pytest.raises(examples.ExampleError):
        examples.run_page(write_page(tmp_path, "```python\nprint(2)\n```\n"))


def test_the_rest_of_what_an_example_prints_may_be_left_out(tmp_path: Path) -> None:
    text = "```python\nprint(1)\nprint({})\n# prints: 1\n# prints: ...\n```\n"
    assert examples.run_page(write_page(tmp_path, text.format(2))) == 1
    with pytest.raises(examples.ExampleError):
        examples.run_page(write_page(tmp_path, text.replace("print({})", "")))
    with pytest.raises(examples.ExampleError):
        examples.run_page(write_page(tmp_path, text.format(2).replace("prints: 1", "prints: 3")))


def test_an_example_that_is_not_run_is_compiled(tmp_path: Path) -> None:
    assert examples.run_page(write_page(tmp_path, "```python not-run\nmodel(x)\n```\n")) == 0
    with pytest.raises(SyntaxError):
        examples.run_page(write_page(tmp_path, "```python not-run\nmodel(x\n```\n"))


EXAMPLE_THAT_COMPILES = """
```python
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        return len(x.shape) + x
print(torch.compile(Model(), backend="eager")(torch.ones(1)))
# prints: tensor([2.])
```
"""
RUN_EXAMPLE = """
import gc, sys, pathlib, torch
from tools import examples
assert examples.run_page(pathlib.Path(sys.argv[1])) == 1
sys.unraisablehook = lambda raised: print("raised", repr(raised.exc_value))
torch._dynamo.reset()
gc.collect()
"""


def test_an_example_that_compiles_raises_nothing_when_it_is_collected(tmp_path: Path) -> None:
    page = write_page(tmp_path, EXAMPLE_THAT_COMPILES)
    command = [sys.executable, "-c", RUN_EXAMPLE, str(page)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "raised" not in result.stdout


def test_no_example_has_prompts() -> None:
    for document in DOCUMENTS:
        assert not re.search(r"^\s*>>> ", text_of(document), re.MULTILINE), document


def test_the_tree_of_the_architecture_exists() -> None:
    tree = re.search(r"```\n(exllama_ops/\n.*?)```", text_of("ARCHITECTURE.md"), re.DOTALL)
    assert tree is not None
    named: set[Path] = set()
    top = ROOT
    for line in tree.group(1).splitlines():
        if match := re.match(r"(  )?(\w[\w./]*)", line):
            inside, name = match.groups()
            path = (top if inside else ROOT) / name
            top = top if inside else path
            named.add(path)
            assert path.exists(), line
    for base in ("exllama_ops", "csrc"):
        folders = {path for path in (ROOT / base).iterdir() if path.is_dir() and path.name != "__pycache__"}
        assert folders <= named


def test_the_imports_of_the_architecture_are_those_of_the_rule() -> None:
    section = text_of("ARCHITECTURE.md").partition("| Part | May import |")[2].partition("\n\n")[0]
    told: dict[str, set[str]] = {}
    for parts, allowed in re.findall(r"^\| (`.*) \| (.*) \|$", section, re.MULTILINE):
        told |= {part: set(re.findall("`(.*?)`", allowed)) for part in re.findall("`(.*?)`", parts)}
    assert told == PARTS


def test_every_page_is_linked_from_the_readme() -> None:
    for path in (ROOT / "docs").glob("*.md"):
        assert re.search(rf"\]\(docs/{path.name}[)#]", text_of("README.md")), path.name


def test_every_decision_is_in_the_index() -> None:
    index = text_of("docs/decisions/README.md")
    for path in (ROOT / "docs" / "decisions").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in index, path.name


def test_every_results_file_has_its_command_in_the_readme_of_the_benchmarks() -> None:
    listed = set(commands("benchmarks/README.md"))
    for path in (ROOT / "benchmarks" / "results").rglob("*.json"):
        assert json.loads(path.read_text())["command"] in listed, path


def test_the_results_that_a_text_names_exist() -> None:
    sources = [ROOT / document for document in DOCUMENTS]
    for folder in ("exllama_ops", "csrc", "benchmarks", "tests"):
        sources += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp")]
    for source in sources:
        for name in re.findall(r"benchmarks/results/[\w./-]+\.(?:md|json)", source.read_text()):
            assert (ROOT / name).exists(), f"{source}: {name}"


def test_no_tracked_file_knows_the_machine_it_was_written_on() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    machine = re.compile(r"(?<![\w.])/(work|home|root|tmp)/\w")
    for name in tracked.stdout.split("\0"):
        path = ROOT / name
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".json", ".cpp", ".h", ""):
            assert not machine.search(path.read_text()), name


def test_no_two_test_files_have_one_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names)), "pytest imports test files by their bare names"
