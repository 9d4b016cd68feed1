"""Errors that the command line reports as one sentence and an exit code."""


class InputError(ValueError):
  """Bad input. The message is one sentence: the value, and what to do.

  `cli.main` prints it without a traceback and exits with a non-zero code.
  """


class NotFiniteError(RuntimeError):
  """A loss or gradient became NaN or infinite; that state was not saved."""


class StoppedError(RuntimeError):
  """A signal ended the run after its state was saved.

  Attributes:
    signal: its number.
  """

  def __init__(self, message: str, *, signal: int) -> None:
    super().__init__(message)
    self.signal = signal
