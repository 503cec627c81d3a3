"""The one error of this package."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as it is; the text names the file and the tensor or field."""
