"""Errors that the command line reports as one sentence and an exit code."""


class InputError(ValueError):
  """Bad input. The message is one sentence: the value, and what to do.

  `cli.main` prints it without a traceback and exits with a non-zero code.
  """


class DamagedError(InputError):
  """A checkpoint cannot be read, or parts of it are missing."""


class NotFiniteError(RuntimeError):
  """A loss, gradient or weight became NaN or infinite; it was not saved."""


class SaveError(RuntimeError):
  """The state of a run could not be saved; earlier saves are untouched."""


class StoppedError(RuntimeError):
  """A signal ended the run after its state was saved.

  Attributes:
    signal: its number.
  """

  def __init__(self, message: str, *, signal: int) -> None:
    super().__init__(message)
    self.signal = signal
