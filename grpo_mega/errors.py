"""What can go wrong, in three kinds. Each message gives the value found, the rule it broke and the remedy.

The command line prints a `GrpoMegaError` as one sentence and exits with its `exit_code`; any other exception is
a defect of ours and keeps its traceback.
"""


class GrpoMegaError(Exception):
    """Root of the family: whatever a user can put right without reading our code."""

    exit_code = 1


class ConfigError(GrpoMegaError):
    """A recipe, an override, a model folder or a layout that cannot work."""

    exit_code = 2


class DataError(GrpoMegaError):
    """A prompt, a data file or a tokenizer that cannot be used; names the file and the line."""

    exit_code = 3


class RewardError(GrpoMegaError):
    """A reward function that cannot be imported or has the wrong signature (one that raises costs one completion)."""

    exit_code = 4


class CheckpointError(GrpoMegaError):
    """A checkpoint that is missing, damaged, or belongs to another model."""

    exit_code = 5


class RunDirectoryError(GrpoMegaError):
    """A run directory that can be written no more while the run goes on: the disk is full, gone or read-only."""

    exit_code = 6
