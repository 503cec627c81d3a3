"""Files and folders of the cache appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from exllama_ops.cache import publishing_file, publishing_folder


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "whole"
    with publishing_folder(target, prefix="whole.") as scratch:
        (scratch / "file").write_text("text")
        assert [path.name.startswith("whole.") for path in tmp_path.iterdir()] == [True]
    assert (target / "file").read_text() == "text"
    assert target.stat().st_mode & 0o777 == 0o755
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_takes_the_place_of_another_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("before")
    with publishing_file(target, prefix="file.") as whole:
        whole.write_text("after")
        assert target.read_text() == "before"
        assert whole.parent.name.startswith("file.")
    assert target.read_text() == "after"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("publishing", [publishing_file, publishing_folder])
def test_what_fails_leaves_nothing(publishing: object, tmp_path: Path) -> None:
    def fill() -> None:
        with publishing(tmp_path / "target", prefix="x.") as path:
            (path if path.is_dir() else path.parent).joinpath("half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert list(tmp_path.iterdir()) == []
