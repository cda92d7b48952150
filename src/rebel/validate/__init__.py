"""What is wrong with the settings of a command, as far as it can be told without loading anything.

A check is a function of all settings that yields complaints. It stands in the file of what it is about, and in the
list of each command that needs it, in `commands`.
"""

from rebel.validate.commands import validate, validate_drawing, validate_scoring

__all__ = ["validate", "validate_drawing", "validate_scoring"]
