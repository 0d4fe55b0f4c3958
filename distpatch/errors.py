"""The errors that distpatch raises; each is also the builtin that a caller would expect."""


class DistPatchError(Exception):
    """Base of every error that distpatch raises on purpose."""


class UnsupportedOpError(DistPatchError, NotImplementedError):
    """An operation that cannot be done on sharded rows, or may not under ``fallback="error"``."""


class LayoutError(DistPatchError, ValueError):
    """Shapes, dims or row bounds that do not fit together."""


class RankError(DistPatchError, RuntimeError):
    """A rank is missing, dead, outside the group, or was called differently from the others."""
