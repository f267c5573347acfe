"""Two torchruns on this machine stand for two nodes; one is lost, the other goes on alone."""

import signal
import socket
import sys
import threading
import time

import pytest
import torch.distributed as dist

from ddpm_fast.runtime.ranks import World, _name_of_this_start

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="not tried elsewhere"),
]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


NODE = ("--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-id", "two-nodes",
        "--local-addr", "127.0.0.1", "--max-restarts", 3, "--shutdown-timeout", 5, "--rdzv-conf",
        "last_call_timeout=4,keep_alive_interval=1,keep_alive_max_attempt=3")  # fmt: skip


@pytest.fixture
def start_node(start_ranks, tmp_path, tiny, flags):
    """start_node(fault=None) -> a torchrun with one rank, of one or two."""
    endpoint = ("--rdzv-endpoint", f"127.0.0.1:{free_port()}")

    def start(*more, fault=None, step=13, **environment):
        module = "tests.faults.trainer" if fault else "ddpm_fast.train"
        argv = ("-m", module, *tiny, *flags, *more, "--run-dir", tmp_path / "run",
                "--auto-resume", "--timeout", 20)  # fmt: skip
        if fault:
            environment |= {"FAULT": fault, "FAULT_RANK": "any", "FAULT_STEP": str(step)}
        return start_ranks(1, *argv, options=(*NODE, *endpoint), **environment)

    return start


def test_a_lost_node_leaves_the_other_to_go_on_from_the_last_checkpoint(
    start_node, tmp_path, rows, undisturbed
):
    """With one rank instead of two: the same losses within rounding."""
    stays = start_node()
    time.sleep(2)  # it is the one that holds the rendezvous
    start_node(fault="kill-node")
    output, _ = stays.communicate(timeout=120)
    assert stays.returncode == 0, output
    assert "on 2 processes (cpu)" in output and "on cpu; run folder" in output
    assert "resumed after step 10 from" in output
    found, expected = rows(tmp_path / "run"), rows(undisturbed)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    losses = [row["loss"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
def test_a_node_that_comes_back_is_taken_in_again(start_node, tmp_path, rows, undisturbed):
    """The one that went on alone saves, and both go on from there."""
    own_stores = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # or the two agents wait for ever
    stays = start_node(fault="wait-alone", step=20, **own_stores)
    time.sleep(2)
    start_node(fault="kill-node", **own_stores).wait(60)
    deadline = time.monotonic() + 60
    while not (found := rows(tmp_path / "run")) or found[-1]["step"] != 20:
        assert stays.poll() is None and time.monotonic() < deadline, stays.communicate()
        time.sleep(0.1)
    back = start_node(**own_stores)
    output = "".join(node.communicate(timeout=120)[0] for node in (stays, back))
    assert stays.returncode == back.returncode == 0, output
    assert "stopped by SIGTERM after step 21" in output
    assert "resumed after step 21 from" in output
    assert output.count("on 2 processes (cpu)") == 2  # before and after
    found, expected = rows(tmp_path / "run"), rows(undisturbed)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    losses = [row["loss"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("whom", [0, 1])
def test_of_two_nodes_the_one_that_was_not_signalled_has_saved_but_not_done_its_work(
    start_ranks, tmp_path, tiny, flags, whom
):
    """A scheduler takes one node back: exit code 0 of the other would say that the run is done."""
    options = ("--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-id", "two", "--local-addr",
               "127.0.0.1", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")  # fmt: skip
    argv = ("-m", "ddpm_fast.train", *tiny, *flags, "--iterations", 10**6, "--run-dir",
            tmp_path / "run", "--timeout", 60)  # fmt: skip
    nodes = [start_ranks(1, *argv, options=options) for _ in range(2)]
    log, deadline = tmp_path / "run" / "log.txt", time.monotonic() + 120
    while not log.exists() or "step 4/" not in log.read_text():
        assert time.monotonic() < deadline and all(node.poll() is None for node in nodes)
        time.sleep(0.1)
    nodes[whom].send_signal(signal.SIGTERM)
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert nodes[1 - whom].returncode != 0, outputs
    assert "error: stopped by a signal to another process after step" in outputs[1 - whom]
    assert "error: stopped by" not in outputs[whom]
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/manifest.json"))


def test_ranks_agree_on_a_name_whatever_killed_ones_left_in_their_store():
    """torchrun's count of restarts, which a node that comes later begins anew, is not asked."""
    store, names = dist.HashStore(), []
    for _ in range(3):  # starts that share the store, each beside what the others left

        def meet(rank):
            names.append(_name_of_this_start(store, World(rank, 3, rank), 10))

        ranks = [threading.Thread(target=meet, args=(rank,)) for rank in (0, 2, 1)]
        for rank in ranks:
            rank.start()
            time.sleep(0.05)  # the first ones find only dead ranks' names
        for rank in ranks:
            rank.join()
    assert len(names) == 9
    assert [len(set(names[at : at + 3])) for at in (0, 3, 6)] == [1, 1, 1]
    assert len(set(names)) == 3


def test_a_rank_that_does_not_come_is_told_within_the_timeout():
    with pytest.raises(dist.DistStoreError, match="2 processes did not meet within 0.2 s"):
        _name_of_this_start(dist.HashStore(), World(0, 2, 0), 0.2)
