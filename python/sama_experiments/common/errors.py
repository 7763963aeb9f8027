"""The one exception that the programs turn into a one-line message and exit status 2."""


class ExperimentError(Exception):
    """Something the user can put right: a missing folder, file, field or package, or settings that contradict."""
