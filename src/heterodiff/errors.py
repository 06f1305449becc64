"""Errors for the user: each message says what was wrong, where, what was expected and the way out."""

import difflib
from collections.abc import Iterable

OUT_OF_MEMORY = ("out of memory", "defaultcpuallocator", "_status_alloc_failed")


class HeterodiffError(ValueError):
    """User's mistake or unusable input. The command line prints the message and exits with 1."""


class ConfigError(HeterodiffError):
    """Unusable configuration."""


class DataError(HeterodiffError):
    """Unusable images, labels or folders."""


class CheckpointError(HeterodiffError):
    """Weights or a checkpoint that cannot be loaded."""


class RunError(HeterodiffError):
    """Run folder that cannot be used as requested."""


def nearest_name(name: str, known: Iterable[str], count: int = 1) -> str:
    """Return `` (did you mean 'x'?)`` for at most ``count`` known names close to ``name``, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=count, cutoff=0.5)
    names = " or ".join(f"'{found}'" for found in close)
    return f" (did you mean {names}?)" if names else ""


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
    """Return True if the memory of the host or of a device ran out."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY))
    )


def compile_error(error: Exception, setting: str) -> HeterodiffError | None:
    """Return the error for a failure of ``torch.compile`` requested by ``setting``; None for any other failure."""
    if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return RunError(
        f"{setting}: torch.compile failed here ({lines[0] if lines else type(error).__name__}); leave it out"
    )


def visible(text: str) -> str:
    """Return ``text`` with characters that control a terminal, as names of classes and files may hold, written out."""
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)
