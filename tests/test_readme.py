"""The README and the docs are true: the rooms, files and commands that they name are there, and every room is named."""

import re
from pathlib import Path

import pytest

from slora_dist.cli import main
from tests.tiny import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_map_names_every_room() -> None:
    package = ROOT / "slora_dist"
    rooms = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    rooms |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    named = set(re.findall(r"`([\w/.]+)`", README[README.index("## The map") :]))
    assert rooms <= named, rooms - named
    assert not {name for name in named if re.fullmatch(r"\w+\.py", name)} - rooms


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    files = [ROOT / name for name in re.findall(r"\b((?:configs|launch|slurm|docs|tests)/[\w/]+\.\w+)", text)]
    missing = [str(path) for path in links + files if not path.exists()]
    assert not missing


def test_the_commands_exist() -> None:
    for command in sorted(set(re.findall(r"slora-dist ([a-z]+)", README))):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
