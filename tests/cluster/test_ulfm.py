"""A rank dies under MPI, and the others go on: Open MPI 5 with ULFM, in an environment of its own (``make test-cluster`` makes it)."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from drill.processes import output
from slora_dist.runfolder import RunFolder
from tests.tiny import ROOT, SHORT, TINY, metrics, run, tensors

BIN = ROOT / ".venv-mpi-ft" / "bin"
RANKS, VICTIM, CLIENT = 5, 3, 2  # the client lives on the victim
SETTINGS = (*SHORT, "clients.count=4", "clients.per_round=4")
# the rank's own program: the victim kills itself in round 3, when it has trained its client
PROGRAM = f"""
import os, sys
from pathlib import Path
from drill import sabotage
if os.environ["OMPI_COMM_WORLD_RANK"] == "{VICTIM}":
    sabotage.at("trained", 3, sabotage.kill, Path(sys.argv.pop(1)))()
else:
    del sys.argv[1]
from slora_dist.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.cluster
def test_the_others_go_on_without_a_rank_that_is_killed(environ: Mapping[str, str], tmp_path: Path) -> None:
    if not (BIN / "mpiexec").exists():
        assert os.environ.get("CI") != "true", "needs the extra mpi-ft (`make test-cluster` installs it)"
        pytest.skip("needs the extra mpi-ft (`make test-cluster` installs it)")
    (tmp_path / "program.py").write_text(PROGRAM)
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    rank = [BIN / "python", tmp_path / "program.py", tmp_path / "mark", "train", TINY, *SETTINGS, "clients.min_clients=2"]
    command = [BIN / "mpiexec", "--with-ft", "ulfm", "--oversubscribe", "-n", str(RANKS), *rank, "--out", tmp_path / "run"]
    said = output(["sh", "-c", '"$@" 2>&1; echo exit code $?', "sh", *command], timeout=300, env={**environ, **as_root})
    assert said.endswith("exit code 3\n") and f"rank {VICTIM} is gone: its connection closed" in said, said
    healed, planned = RunFolder(tmp_path / "run"), run(tmp_path / "planned", *SETTINGS, f"clients.away={{{CLIENT}: [3]}}")
    assert [(lost["rank"], lost["round"], lost["clients"]) for lost in healed.summary()["lost"]] == [(VICTIM, 3, [CLIENT])]
    assert tensors(healed) == tensors(planned)
    assert [line["missing"]["clients"] for line in metrics(healed)] == [[], [], [CLIENT], [CLIENT]]
    output([sys.executable, "-m", "slora_dist", "audit", healed.path], env=environ)
