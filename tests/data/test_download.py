import hashlib
import socket

import numpy as np
import pytest

from ddpm_fast.data import DataError
from ddpm_fast.data.download import download

CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
MD5 = hashlib.md5(CONTENT).hexdigest()


def part_of(path):
    return path.with_name(path.name + ".part")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_download_is_whole_and_leaves_no_part(tmp_path, serve):
    server, path = serve(CONTENT), tmp_path / "new" / "file"
    download(server.url, path, md5=MD5)
    assert path.read_bytes() == CONTENT
    assert names_in(path.parent) == ["file"]


def test_a_file_that_is_there_is_not_downloaded_again(tmp_path, serve):
    server, path = serve(CONTENT), tmp_path / "file"
    path.write_bytes(CONTENT)
    download(server.url, path, md5=MD5)
    assert server.ranges == []


def test_a_part_is_resumed_where_it_ends(tmp_path, serve):
    server, path = serve(CONTENT), tmp_path / "file"
    part_of(path).write_bytes(CONTENT[:1_234_567])
    download(server.url, path, md5=MD5)
    assert server.ranges == ["bytes=1234567-"]
    assert path.read_bytes() == CONTENT


def test_a_server_that_ignores_range_gives_the_file_from_its_start(tmp_path, serve):
    server, path = serve(CONTENT), tmp_path / "file"
    server.honours_range = False
    part_of(path).write_bytes(b"other bytes" * 1000)
    download(server.url, path, md5=MD5)
    assert path.read_bytes() == CONTENT


def test_broken_connections_are_taken_up_again(tmp_path, serve):
    server, path = serve(CONTENT), tmp_path / "file"
    server.bytes_per_connection = 1_000_000
    download(server.url, path, md5=MD5)
    assert server.ranges == [None, "bytes=1000000-", "bytes=2000000-"]
    assert path.read_bytes() == CONTENT


def test_a_server_that_never_finishes_is_an_error_that_keeps_the_part(tmp_path, serve):
    server, path = serve(CONTENT), tmp_path / "file"
    server.honours_range, server.bytes_per_connection = False, 1_000_000
    with pytest.raises(DataError, match="ended early; 1000000 bytes so far"):
        download(server.url, path, md5=MD5)
    assert len(server.ranges) == 2
    assert names_in(tmp_path) == ["file.part"]


def test_a_part_that_is_whole_already_is_only_checked(tmp_path, serve):
    server, path = serve(CONTENT), tmp_path / "file"
    part_of(path).write_bytes(CONTENT)
    download(server.url, path, md5=MD5)
    assert path.read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_dropped(tmp_path, serve):
    server, path = serve(CONTENT), tmp_path / "file"
    part_of(path).write_bytes(CONTENT + b"more")
    download(server.url, path, md5=MD5)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT) + 4}-", None]


def test_a_wrong_checksum_names_both_and_keeps_the_file_aside(tmp_path, serve):
    server, path = serve(CONTENT[:-1] + b"!"), tmp_path / "file"
    got = hashlib.md5(server.content).hexdigest()
    for names in (["file.bad"], ["file.bad", "file.bad-1"]):
        with pytest.raises(DataError, match=f"has MD5 {got}, expected {MD5}"):
            download(server.url, path, md5=MD5)
        assert names_in(tmp_path) == names
    server.content = CONTENT
    download(server.url, path, md5=MD5)
    assert path.read_bytes() == CONTENT
    assert (tmp_path / "file.bad").exists()


def test_a_wrong_file_that_was_there_is_neither_used_nor_touched(tmp_path, serve):
    server, path = serve(CONTENT), tmp_path / "file"
    path.write_bytes(b"the user's own")
    with pytest.raises(DataError, match="left as it is"):
        download(server.url, path, md5=MD5)
    assert path.read_bytes() == b"the user's own"
    assert server.ranges == []


def test_no_network_is_one_line_with_the_address_and_the_way_by_hand(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/archive"
    path = tmp_path / "file"
    with pytest.raises(DataError) as caught:
        download(url, path, md5=MD5, hint="set MIRROR")
    line = str(caught.value)
    assert url in line and f"put the file at {path} by hand" in line and "set MIRROR" in line
    assert "\n" not in line
    assert names_in(tmp_path) == []


def test_an_unknown_host_is_one_line(tmp_path):
    with pytest.raises(DataError, match="cannot download http://no-such-host.invalid/file"):
        download("http://no-such-host.invalid/file", tmp_path / "file", md5=MD5)


def test_http_errors_are_named(tmp_path, serve):
    server = serve(CONTENT)
    server.status = 404
    with pytest.raises(DataError, match="HTTP 404 Not Found"):
        download(server.url, tmp_path / "file", md5=MD5)


@pytest.mark.parametrize("url", ["", "archive.tar.gz", "ftp://host/file", "file:///etc/hosts"])
def test_other_addresses_are_refused(tmp_path, url):
    with pytest.raises(DataError, match="allowed: an http:// or https:// address"):
        download(url, tmp_path / "file", md5=MD5)


def test_a_folder_that_cannot_be_made_is_named(tmp_path, serve):
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="cannot write .*taken.*--data-root"):
        download(serve(CONTENT).url, tmp_path / "taken" / "file", md5=MD5)


def test_progress_reaches_the_callback_in_bytes(tmp_path, serve):
    calls = []
    server = serve(CONTENT)
    download(server.url, tmp_path / "file", md5=MD5, on_progress=lambda *call: calls.append(call))
    assert calls[-1] == (f"downloading {server.url}", len(CONTENT), len(CONTENT))


def test_without_a_terminal_progress_is_one_line(tmp_path, serve, capfd):
    server = serve(CONTENT)
    download(server.url, tmp_path / "file", md5=MD5)
    assert capfd.readouterr().err == f"downloading {server.url} (3.0 MB)\n"


def test_a_bar_is_drawn_on_a_terminal(tmp_path, serve, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    download(serve(CONTENT).url, tmp_path / "file", md5=MD5)
    assert "MB" in capsys.readouterr().err


RANK = """
import sys
from pathlib import Path
from ddpm_fast.data.download import download
download(sys.argv[1], Path(sys.argv[2]), md5=sys.argv[3])
"""


def test_parallel_processes_download_once(tmp_path, serve, start_python):
    server, path = serve(CONTENT), tmp_path / "file"
    server.wait_s = 0.5  # long enough for all to ask for the lock
    ranks = [start_python(RANK, server.url, path, MD5) for _ in range(3)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=30)
        assert rank.returncode == 0, errors
    assert len(server.ranges) == 1
    assert path.read_bytes() == CONTENT


def test_a_killed_download_is_resumed_and_its_lock_is_free(tmp_path, serve, start_python):
    server, path = serve(CONTENT), tmp_path / "file"
    part_of(path).write_bytes(CONTENT[:1000])
    server.wait_s = 30.0
    rank = start_python(RANK, server.url, path, MD5)
    while not server.ranges:
        assert rank.poll() is None
    rank.kill()
    rank.wait()
    server.wait_s = 0.0
    download(server.url, path, md5=MD5)
    assert server.ranges == ["bytes=1000-"] * 2


FULL_DISK = """
import resource, sys
from pathlib import Path
from ddpm_fast.data import DataError
from ddpm_fast.data.download import download
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
try:
    download(sys.argv[1], Path(sys.argv[2]), md5=sys.argv[3])
except DataError as error:
    print(error)
"""


def test_a_full_disk_is_one_line(tmp_path, serve, start_python):
    pytest.importorskip("resource")
    process = start_python(FULL_DISK, serve(CONTENT).url, tmp_path / "file", MD5)
    output, errors = process.communicate(timeout=30)
    assert output.startswith(f"disk full while writing {part_of(tmp_path / 'file')}"), errors
    assert output.count("\n") == 1
    assert names_in(tmp_path) == ["file.part"]
