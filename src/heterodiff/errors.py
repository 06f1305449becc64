"""Errors meant for the user: each says what was wrong, where, what was expected and the way out."""

import difflib
from collections.abc import Iterable

OUT_OF_MEMORY = ("out of memory", "defaultcpuallocator", "_status_alloc_failed")


class HeterodiffError(ValueError):
    """A user's mistake or unusable input. The command line prints it as one message and exits with 1."""


class ConfigError(HeterodiffError):
    """A configuration that cannot be used."""


class DataError(HeterodiffError):
    """Images, labels or folders that cannot be used."""


class CheckpointError(HeterodiffError):
    """Weights or a checkpoint that cannot be loaded."""


class RunError(HeterodiffError):
    """A run folder that cannot be used as asked."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a ``name`` of some ``kind`` that is not among the ``known`` ones."""
    known = list(known)
    return f"unknown {kind} '{name}'{nearest_name(name, known)}; known: {', '.join(known)}"


def reason(error: Exception) -> str:
    """Return the message of ``error``, or else its type, on one line and not too long."""
    if "trust_remote_code" in str(error):  # how transformers refuses it, and how to allow it
        return "its auto_map asks for Python code of its own, and custom code is never run"
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: that of the machine, or of a device, however its library says so."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY))
    )


def compile_error(error: Exception, setting: str) -> HeterodiffError | None:
    """The message for a failure of ``torch.compile`` that ``setting`` asked for; None for any other error."""
    if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return RunError(
        f"{setting}: torch.compile failed here ({lines[0] if lines else type(error).__name__}); leave it out"
    )
