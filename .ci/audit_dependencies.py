"""Look every installed dependency up in PyPI's list of vulnerabilities: 1 when one is known, 0 when none is or the list cannot be had.

pip-audit says "No known vulnerabilities found" also when it could look nothing up. So a package that is known to be vulnerable is looked up
together with the others: unless that one is found, nothing was audited, and this says so.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CANARY = ("flask", "0.12.2")  # CVE-2018-1000656 and others


def judge(report: dict[str, Any] | None) -> tuple[int, str]:
    """Return (exit code, what to say) for pip-audit's report, or for None when it made none."""
    rows = report["dependencies"] if report else []
    canary, own = ([row for row in rows if (row["name"].lower() == CANARY[0]) == which] for which in (True, False))
    if not any(row.get("vulns") for row in canary):
        return 0, "WARNING: DEPENDENCIES WERE NOT AUDITED: PyPI's list of vulnerabilities cannot be reached from here."
    found = [f"{row['name']} {row['version']}: {', '.join(hole['id'] for hole in row['vulns'])}" for row in own if row.get("vulns")]
    skipped = [row["name"] for row in own if "skip_reason" in row]
    told = [f"VULNERABLE: {line}" for line in found] + ([f"not on PyPI, so not audited: {', '.join(skipped)}"] if skipped else [])
    return int(bool(found)), "\n".join([*told, f"{len(own) - len(skipped)} dependencies audited, {len(found)} vulnerable"])


def main() -> int:
    """Audit this interpreter's environment."""
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    listed = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    pins = [re.sub(r"\+\w+$", "", line) for line in listed.splitlines() if "==" in line]  # torch==2.13.0+cpu is PyPI's 2.13.0
    with tempfile.TemporaryDirectory() as scratch:
        wanted, report = Path(scratch, "requirements.txt"), Path(scratch, "report.json")
        wanted.write_text("\n".join([*pins, "==".join(CANARY)]) + "\n", encoding="utf-8")
        options = ["--requirement", str(wanted), "--no-deps", "--disable-pip", "--progress-spinner", "off"]
        command = [sys.executable, "-m", "pip_audit", *options, "--format", "json", "--output", str(report)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(report.read_text(encoding="utf-8")) if report.exists() and report.stat().st_size else None
    if found is None:
        print(ended.stderr[-500:], file=sys.stderr)
    code, text = judge(found)
    print(text, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
