"""The one exception for what a user can cause, and the exit codes that scripts may rely on."""

GAVE_OUT = 1  # the machine: a full disk, a folder that turned read-only; also what nobody expected
USAGE = 2  # a flag, a file or a combination of options is wrong
SOME_FAILED = 3  # the run ended, but some images could not be read
NOTHING_TO_DO = 4  # no input image matched
MISSING_PIECE = 5  # weights, an optional extra or a device are not there
REGRESSION = 6  # an expectation of eval or compare was not met


class DepthsegError(Exception):
    """What went wrong in one sentence, what to do about it in another, and the exit code of the process."""

    def __init__(self, message: str, hint: str = "", code: int = USAGE):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message
