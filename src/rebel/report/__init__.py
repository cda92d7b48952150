"""What people see of a run: rows on disk, a table on the terminal, report.html at the end. Imports no torch."""

from rebel.report.page import write_report
from rebel.report.rows import append_rows, read_rows, truncate_after
from rebel.report.terminal import Terminal

__all__ = ["Terminal", "append_rows", "read_rows", "truncate_after", "write_report"]
