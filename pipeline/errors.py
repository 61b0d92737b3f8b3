"""What can go wrong, in two kinds: the user must change something, or the work failed.

A user error says three things: the value that was found, the rule it breaks, the remedy.
`cli.main` turns both kinds into one message and an exit code; neither shows a traceback.
"""


class AlstError(Exception):
    """The work failed; exit code 1."""

    exit_code = 1


class UserError(AlstError):
    """The user must change something; exit code 2. The message says value, rule and remedy."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe, or an override of it, says something that cannot be meant."""


class DataError(UserError):
    """A document, a source or a packed data set is not what it should be."""


class RunError(AlstError):
    """A process of a run failed."""
