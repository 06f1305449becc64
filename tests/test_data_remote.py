"""Shards on a real web server give what the same files give, and its failures are one clear line."""

import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from heterodiff.config import DataConfig
from heterodiff.data.decoding import remote
from heterodiff.data.decoding.remote import RemoteFile, remote_url, shown_url
from heterodiff.data.sources import load_data
from heterodiff.errors import DataError
from heterodiff.training.start import train
from tests.test_data_webdataset import SAMPLES, SHARDS, write_shards
from tests.training_runs import tiny_config


class Server(ThreadingHTTPServer):
    """Serves the files of a folder, in parts unless it is told otherwise; the next answers may be failures."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.sends_parts, self.failures, self.requests = folder, True, list[int](), list[str]()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.headers["Range"])
        if self.server.failures:
            status = self.server.failures.pop(0)
            if status:
                self.send_error(status)
            return  # 0: the connection ends without an answer
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found
        start, stop = int(found[1]), min(int(found[2]) + 1, len(content))
        if start >= len(content):
            self.send_error(416)
            return
        part = content[start:stop] if self.server.sends_parts else content
        self.send_response(206 if self.server.sends_parts else 200)
        if self.server.sends_parts:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    with Server(write_shards(tmp_path / "shards", "cls")) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def config(path: str, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"source": "webdataset", "path": path, "val_fraction": 0.25, **settings})


@pytest.mark.parametrize("memory_limit_gb", [4.0, 1e-9])
def test_the_same_as_files(memory_limit_gb: float, server: Server) -> None:
    local = load_data(config(str(server.folder / "part-{000..002}.tar"), memory_limit_gb=memory_limit_gb))
    found = load_data(config(f"{server.address}/part-{{000..002}}.tar", memory_limit_gb=memory_limit_gb))
    assert found.spec == local.spec
    for mine, theirs in ((found.train, local.train), (found.val, local.val)):
        assert mine.names == theirs.names
        rows = range(len(mine))
        for values, expected in zip(mine.batch(rows), theirs.batch(rows), strict=True):
            assert torch.equal(values, expected)


def test_images_that_fit_into_memory_are_asked_for_once(server: Server) -> None:
    data = load_data(config(f"{server.address}/part-{{000..002}}.tar"))
    asked = len(server.requests)
    assert asked <= SHARDS * (SAMPLES + 3)  # each image; and the size and the list of each shard, and their end
    data.train.batch(range(len(data.train)))
    assert len(server.requests) == asked


@pytest.mark.parametrize("workers", [0, 1])
def test_training_is_that_on_files(workers: int, server: Server, tmp_path: Path) -> None:
    """Also where another process asks for every image again."""
    places = {"local": str(server.folder / "part-{000..002}.tar"), "remote": f"{server.address}/part-{{000..002}}.tar"}
    for name, path in places.items():
        keys = {"data__source": "webdataset", "data__path": path, "data__memory_limit_gb": 4.0 if workers == 0 else 0.0}
        keys |= {"model__variant": "unet-conv", "model__channel_mult": [1], "training__num_workers": workers}
        train(tiny_config(tmp_path / name, **keys, training__steps=2), quiet=True)
    weights = [(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for name in places]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("status", [0, *remote.PASSING])
def test_failures_that_pass(status: int, server: Server) -> None:
    server.failures = [status, status]
    file = RemoteFile(f"{server.address}/part-000.tar")
    expected = (server.folder / "part-000.tar").read_bytes()
    assert file.read(700) == expected[:700]
    assert file.size == len(expected)
    file.seek(-512, 2)
    assert file.read() == expected[-512:]
    assert file.read(1) == b""


@pytest.mark.parametrize(
    ("name", "failures", "message"),
    [
        ("missing.tar", [], "cannot be read: HTTP 404"),
        ("part-000.tar", [403], "cannot be read: HTTP 403"),
        ("part-000.tar", [503] * 3, "cannot be read: HTTP 503"),
        ("part-000.tar", [0] * 3, "cannot be read: Remote end closed"),
    ],
)
def test_failures_that_stay(name: str, failures: list[int], message: str, server: Server) -> None:
    server.failures = failures
    with pytest.raises(DataError, match=f"^{server.address}/{name}: {message}") as refused:
        load_data(config(f"{server.address}/{name}?signature=secret"))
    assert "secret" not in str(refused.value)


def test_a_server_that_sends_whole_files_is_refused(server: Server) -> None:
    server.sends_parts = False
    with pytest.raises(DataError, match="the server does not send parts of files"):
        load_data(config(f"{server.address}/part-000.tar"))
    assert len(server.requests) == 1


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.0,))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(DataError, match=rf"^http://127.0.0.1:{port}/a.tar: cannot be read: .*refused"):
        load_data(config(f"http://127.0.0.1:{port}/a.tar"))


def test_a_shard_that_is_cut_off(server: Server) -> None:
    shard = server.folder / "part-001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"part-001.tar: not readable as a tar file"):
        load_data(config(f"{server.address}/part-{{000..002}}.tar"))


def test_addresses() -> None:
    assert remote_url(Path("https://user:word@host:8/a/b.tar")) == "https://user:word@host:8/a/b.tar"
    assert shown_url("https://user:word@host:8/a/b.tar?key=1") == "https://host:8/a/b.tar"
    for path in ("a/b.tar", "/https/b.tar", "ftp://a/b.tar", "file:///etc/passwd"):
        assert remote_url(Path(path)) is None
