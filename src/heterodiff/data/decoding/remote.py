"""Files on web servers, read in parts where they lie."""

import io
import re
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

SECONDS, PAUSES = 60.0, (0.5, 2.0, 8.0)
"""Time to wait for an answer, and before each further try."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses of errors that may pass."""
BUFFER_BYTES = 2**20
FOUND_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def remote_url(path: Path) -> str | None:
    """Return the address that a path was made from, which has lost a slash; None for a path on this machine."""
    found = re.fullmatch(r"(https?):/([^/].*)", path.as_posix())
    return f"{found[1]}://{found[2]}" if found else None


def shown_url(url: str) -> str:
    """Return an address without its query and password, which may be secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"


class RemoteFile(io.RawIOBase):
    """A file at an ``http`` or ``https`` address; every read is a request for these bytes alone.

    Raises:
        OSError: the server cannot be reached, refuses the file, or sends it only as a whole.
    """

    def __init__(self, url: str):
        super().__init__()
        self.url, self._position, self._size = url, 0, -1

    @property
    def size(self) -> int:
        """Number of bytes."""
        if self._size < 0:
            self._request(0, 1)
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}
        self._position = offset + (self.size if whence == io.SEEK_END else start[whence])
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._request(self._position, len(buffer)) if len(buffer) else b""
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _request(self, start: int, count: int) -> bytes:
        """Return ``count`` bytes from ``start``, fewer at the end of the file; tries again where errors may pass."""
        for pause in (*PAUSES, None):
            try:
                return self._get(start, count)
            except HTTPError as error:
                error.close()
                if error.code == 416:  # beyond the end
                    return b""
                if pause is None or error.code not in PASSING:
                    raise OSError(None, f"HTTP {error.code} {error.reason}") from None
            except (OSError, HTTPException) as error:
                if pause is None or isinstance(error, NoParts):
                    raise OSError(None, str(getattr(error, "reason", error)) or type(error).__name__) from None
            time.sleep(pause)
        raise AssertionError("the last try has no pause")

    def _get(self, start: int, count: int) -> bytes:
        request = Request(self.url, headers={"Range": f"bytes={start}-{start + count - 1}"})
        with urlopen(request, timeout=SECONDS) as answer:
            found = FOUND_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status != 206 or found is None or int(found[1]) != start:
                raise NoParts("the server does not send parts of files (HTTP Range)")
            self._size = int(found[3])
            content = answer.read(count)
        if len(content) < int(found[2]) - start + 1:
            raise OSError("the connection ended early")
        return content


class NoParts(OSError):
    """The server sends files only as a whole."""
