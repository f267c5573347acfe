"""Really made files and a server on this machine, for the failures that data can meet."""

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ddpm_fast
from ddpm_fast.data import cifar10


def encoded(pixels, file_format="PNG", **options) -> bytes:
    """The file Pillow writes for an image or an array of pixels."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


@pytest.fixture
def encode():
    return encoded


@pytest.fixture
def noise_image():
    """seed -> (H, W, 3) uint8 noise, the same for one seed."""

    def make(seed=0, height=8, width=8):
        shape = (height, width, 3)
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    return make


@pytest.fixture
def image_folder(tmp_path, noise_image):
    """Six images in two subfolders, made in another order than they are read in."""
    folder = tmp_path / "pictures"
    for number in reversed(range(6)):
        path = folder / ("cats" if number < 2 else "dogs") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise_image(number)))
    return folder


@pytest.fixture
def start_python(tmp_path):
    """Start Python code in another process, with its arguments in sys.argv; ended with the test."""
    processes = []

    def start(code, *arguments, **environment):
        root = str(Path(ddpm_fast.__path__[0]).parent)
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": root, **environment},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


class Server(ThreadingHTTPServer):
    """Serves `content` at every path, with the faults a test asks for."""

    daemon_threads = True

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.honours_range = True
        self.status = 200
        self.bytes_per_connection = len(content)  # fewer: every connection breaks off
        self.wait_s = 0.0  # before the body
        self.ranges = []  # the Range header of each request

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/archive"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        threading.Event().wait(server.wait_s)
        if server.status != 200:
            self.send_error(server.status)
            return
        total = len(server.content)
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and server.honours_range else 0
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        self.wfile.write(server.content[start : start + server.bytes_per_connection])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(content) -> a running Server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(content):
        server = Server(content)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def cifar10_records():
    """member name -> (10000, 3073) uint8 records that compress well and differ between members."""
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (10, cifar10.RECORD_BYTES), dtype=np.uint8)
    members = {}
    for number, name in enumerate(cifar10.MEMBERS["train"] + cifar10.MEMBERS["test"]):
        labels = (np.arange(cifar10.RECORDS_PER_MEMBER) + number) % 10
        members[name] = tiles[labels]
        members[name][:, 0] = labels
    return members


def tar_gz(members) -> bytes:
    """name -> bytes or array as a .tar.gz"""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            data = bytes(content)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def make_tar_gz():
    return tar_gz


@pytest.fixture(scope="session")
def cifar10_archive(cifar10_records):
    """(bytes, MD5) of an archive with CIFAR-10's layout and sizes."""
    content = tar_gz(cifar10_records)
    return content, hashlib.md5(content).hexdigest()
