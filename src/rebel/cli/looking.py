"""`rebel report` and `rebel doctor`, which look and change no run."""

from __future__ import annotations

import argparse
from typing import Any

from rebel.cli.options import command, folder_of, holding


def add_report(commands: Any) -> None:
    parser = command(commands, "report", report, "write report.html of a run, also of one that still runs")
    parser.add_argument("run", help="folder of the run")


def report(arguments: argparse.Namespace) -> int:
    run = holding(folder_of(arguments.run), ("config.yaml", "metrics.jsonl"), "run")
    from rebel.report import write_report

    print(write_report(run))
    return 0


def add_doctor(commands: Any) -> None:
    command(commands, "doctor", doctor, "versions, devices, what will not work and why")


def doctor(arguments: argparse.Namespace) -> int:
    from rebel.doctor import doctor

    return doctor()
