"""What a command prints of a finished export's checks and doubts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from export.diagnose.finding import Finding
from export.diagnose.held_out import told_accuracy

__all__ = ["check_lines", "warning_lines"]


def check_lines(checks: Mapping[str, Mapping[str, float]], findings: tuple[Finding, ...], calibration: int) -> Iterator[str]:
    """Args:
        checks: by target.
        calibration: how many calibration images there were.
    """  # fmt: skip
    count = len(findings)
    warned = f", {count} warning{'' if count == 1 else 's'} below" if findings else ""
    for target, numbers in checks.items():
        told = ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if "accuracy" not in k and "validation" not in k)
        yield f"{target}: every check passed{warned} ({told})"
        yield f"{target}: {told_accuracy(numbers, calibration)}"


def warning_lines(findings: tuple[Finding, ...]) -> Iterator[str]:
    for finding in findings:
        yield f"warning: {finding.message} [{finding.code}]"
