"""`distegnn doctor`: check the machine and the installation, and print the findings with their remedies."""

from __future__ import annotations

import json
from dataclasses import asdict

from ..planning import doctor
from ..utils.console import print_line


def run_doctor(as_json: bool = False) -> bool:
    """Print the findings of all checks. Returns whether there is no problem."""
    findings = doctor.run_checks()
    for finding in findings:
        label = "PROBLEM" if finding.state == "problem" else finding.state
        print_line(f"{label:7} {finding.check}: {finding.text}", 8)
        if finding.remedy:
            print_line(f"        → {finding.remedy}", 10)
    problems = sum(finding.state == "problem" for finding in findings)
    print(f"{problems} problem{'s' * (problems > 1)}" if problems else "all well")
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    return not problems
