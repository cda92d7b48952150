"""The command line. Nothing imports torch before the command and its settings are known to be right.

A command has a file with its options and with what it does, and its place in `entry`.
"""

from rebel.cli.entry import main, parse
from rebel.cli.options import spelled

__all__ = ["main", "parse", "spelled"]
