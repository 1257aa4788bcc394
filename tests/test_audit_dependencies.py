"""The audit of dependencies never says that all is well when it has looked nothing up."""

import runpy
from typing import Any

import pytest

from tests.tiny import ROOT

judge = runpy.run_path(str(ROOT / ".ci" / "audit_dependencies.py"))["judge"]
FINE = {"name": "numpy", "version": "2.4", "vulns": []}
HOLE = {"name": "jinja2", "version": "2.10", "vulns": [{"id": "PYSEC-2019-217"}]}
SKIPPED = {"name": "inhouse", "skip_reason": "Dependency not found on PyPI"}
CANARY = {"name": "Flask", "version": "0.12.2", "vulns": [{"id": "PYSEC-2018-66"}]}


@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        (None, 0, "NOT AUDITED"),
        ([FINE, HOLE], 0, "NOT AUDITED"),
        ([SKIPPED, {"name": "flask", "skip_reason": "not found"}], 0, "NOT AUDITED"),
        ([FINE, {**CANARY, "vulns": []}], 0, "NOT AUDITED"),
        ([FINE, CANARY], 0, "1 dependencies audited, 0 vulnerable"),
        ([FINE, SKIPPED, CANARY], 0, "not on PyPI, so not audited: inhouse\n1 dependencies audited, 0 vulnerable"),
        ([FINE, HOLE, CANARY], 1, "VULNERABLE: jinja2 2.10: PYSEC-2019-217"),
    ],
)
def test_what_the_report_means(rows: list[dict[str, Any]] | None, code: int, said: str) -> None:
    found, text = judge(rows and {"dependencies": rows})
    assert found == code and said in text
