"""The two kinds of failure that a user sees.

``ConfigError`` is what the user can mend by changing a setting or a file: it ends the program with exit code 2 before any training.
``RunError`` is what broke while the run was under way: it names rank, phase, round and operation and ends with exit code 1.
"""


class ConfigError(ValueError):
    """A setting or a file that cannot be used.

    ``setting`` is the dotted name (``method.sparse.density``) or a path, ``problem`` says what is wrong, ``allowed`` what would be right.
    """

    agreed = False  # whether all ranks raise it together, so that rank 0 speaks for them

    def __init__(self, setting: str, problem: str, allowed: str) -> None:
        self.setting, self.problem, self.allowed = setting, problem, allowed
        super().__init__(f"{setting}: {problem}. Allowed: {allowed}.")


class RunError(RuntimeError):
    """A failure in the middle of a run: a peer that is gone, a frame that is not valid, a message that is too late."""


class RootGone(RunError):
    """Rank 0 does not answer, or gives no sign of life: it stands still, or its machine is gone. Ends with exit code 4, since nobody but
    those who wait for rank 0 can say so.
    """


class TransportError(RunError):
    """A collective that broke: a peer is gone, silent or late. Where ranks heal, the round is played again with those who are left."""
