"""The shape of the house, read from the syntax trees: which way imports point, what is never called, and how long a file gets."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import ROOT

LEVELS = (
    "config ending errors log memory secret section seeding settings world",
    "codec completion counters disk dropout fixed formats journal ledger linear links masks secure sparse support svd topk wire",
    "comm",
    "aggregate data",
    "model network privacy roundplan",
    "client clientstate fisher methods",
    "adapters admission agreement clock evaluate exactsum exchange export handover personal plan runfolder stage summary timing upload",
    "rounds",
    "audit device job report scalars show study",
    "calibrate",
    "__main__ arguments cli commands doctor slurm",
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms.split()}
PACKAGE = ROOT / "slora_dist"
FILES = sorted(PACKAGE.rglob("*.py"))
SHIPPED = ("*.md", "Makefile", "docs/*", "configs/**/*.yaml", "launch/*", "slurm/*", "slora_dist/**/*.py", "tests/**/*.py")
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOWER_CASE = {"send", "isend", "recv", "irecv", "bcast", "gather", "scatter", "reduce", "allgather", "allreduce", "alltoall", "sendrecv"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield every module that is imported, inside functions too, and every name imported from one as if it were a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tree_of(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


@every_file
def test_imports_point_downwards(path: Path) -> None:
    """A room may use rooms of lower levels, and those of its own level as long as they do not use it (``test_no_circles``)."""
    if path.name == "__init__.py" and path.parent == PACKAGE:
        assert not list(imported(tree_of(path)))
        return
    for used in rooms_used(path):
        assert LEVEL[used] <= LEVEL[room(path)], f"{room(path)} (level {LEVEL[room(path)]}) imports {used} (level {LEVEL[used]})"


def rooms_used(path: Path) -> set[str]:
    names = [name.split(".")[1] for name in imported(tree_of(path)) if name.startswith("slora_dist.")]
    return {name for name in names if not name.startswith("__")} - {room(path)}


def test_no_circles() -> None:
    uses: dict[str, set[str]] = {}
    for path in FILES:
        uses.setdefault(room(path), set()).update(rooms_used(path))
    while uses:
        done = {name for name, used in uses.items() if not used & set(uses)}
        assert done, f"these import each other: {sorted(uses)}"
        uses = {name: used for name, used in uses.items() if name not in done}


def test_every_room_has_its_level() -> None:
    assert {room(path) for path in FILES} - {"__init__"} == set(LEVEL)


def test_transports_and_methods_meet_in_rounds_only() -> None:
    meeting = [room(path) for path in FILES if {"comm", "methods"} <= rooms_used(path)]
    assert set(meeting) <= {"rounds", "job"}
    assert not any("support" in rooms_used(path) for path in (PACKAGE / "comm").glob("*.py")), "transports move bytes"


@every_file
def test_nothing_is_pickled(path: Path) -> None:
    tree = tree_of(path)
    assert not {name.split(".")[0] for name in imported(tree)} & PICKLES
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert not node.attr.endswith(("_object", "_object_list")), f"{node.attr} pickles"
            assert ast.unparse(node) != "torch.load", "safetensors instead"


def test_mpi_moves_buffers() -> None:
    """mpi4py's lower-case verbs pickle, the upper-case ones do not."""
    nodes = ast.walk(tree_of(PACKAGE / "comm" / "mpi_comm.py"))
    verbs = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self._ranks"}
    assert not verbs & LOWER_CASE and {"Isend", "Irecv", "Ibcast", "Ireduce"} <= verbs


WALL_CLOCKS = {"time.time", "time.time_ns", "time.localtime", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}


@every_file
def test_only_monotonic_clocks_decide(path: Path) -> None:
    """The wall clock may jump: it is read in one place, to stamp records, and nothing waits by it or is late by it."""
    names = [f".{ast.unparse(node)}" for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)]
    read = {clock for clock in WALL_CLOCKS for name in names if name.endswith(f".{clock}")}
    assert not read or path.name == "clock.py"
    assert not {name for name in imported(tree_of(path)) if name in WALL_CLOCKS}, "imported by name, it would not be seen"


@every_file
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def test_nothing_knows_the_machine_that_it_was_written_on() -> None:
    needle = "/wo" + "rk/"
    files = [path for pattern in SHIPPED for path in ROOT.glob(pattern) if path.is_file()]
    assert len(files) > 50
    assert not [path for path in files if needle in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("slora_dist.cli", "torch transformers peft datasets mpi4py"),
        ("slora_dist.settings", "torch transformers peft datasets mpi4py"),
        ("slora_dist.comm.torch_comm", "transformers peft datasets mpi4py slora_dist.support"),
        ("slora_dist.comm.metered", "transformers peft datasets mpi4py"),
    ],
)
def test_what_is_heavy_comes_late(module: str, heavy: str) -> None:
    """Importing torch or peft costs seconds, and importing mpi4py's MPI starts it."""
    code = f"import sys, {module}; print(*[name for name in {heavy.split()} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not found
