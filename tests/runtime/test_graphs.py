"""CapturedCall on a pretended CUDA device: which stream, which reason, what is freed when."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

from ddpm_fast.runtime.graphs import CapturedCall

CPU, CUDA_1 = torch.device("cpu"), torch.device("cuda", 1)
POOL = (0, 7)


class Cuda:
    """torch.cuda as far as a CapturedCall uses it. `seen`: (what, device, stream, gc is on)."""

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other):
            assert other is not self

    def __init__(self, monkeypatch):
        self.seen, self.fails, self.graphs = [], None, []
        self.workspaces_freed_after = []
        self.now_device, self.default = torch.device("cuda", 0), self.Stream()
        self.now_stream = self.default
        monkeypatch.setattr(torch.cuda, "Stream", self.Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.now_stream)
        monkeypatch.setattr(torch.cuda, "device", lambda it: self.become("now_device", it))
        monkeypatch.setattr(torch.cuda, "stream", lambda it: self.become("now_stream", it))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.see("emptied"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
        monkeypatch.setattr(
            torch._C, "_cuda_clearCublasWorkspaces",
            lambda: self.workspaces_freed_after.extend(self.names()[-1:]), raising=False,
        )  # fmt: skip
        for name in ("endAllocateToPool", "releasePool"):
            monkeypatch.setattr(
                torch._C, f"_cuda_{name}", lambda *its, name=name: self.pool(name, *its),
                raising=False,
            )  # fmt: skip

    @contextmanager
    def become(self, name, value):
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, before)

    def see(self, what):
        self.seen.append((what, self.now_device, self.now_stream, gc.isenabled()))

    def graph(self):
        cuda = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                assert capture_error_mode == "thread_local" and pool == POOL
                cuda.allocating = True
                cuda.see("begin")

            def capture_end(self):
                cuda.see("end")
                if cuda.fails:  # and the allocator was not told
                    raise RuntimeError(cuda.fails)
                cuda.allocating = False

            def replay(self):
                cuda.see("replay")

            def reset(self):
                cuda.see("reset")

        made = Graph()
        self.graphs.append(weakref.ref(made))
        return made

    def pool(self, name, device, pool):
        assert (device, pool) == (CUDA_1.index, POOL)
        if not self.allocating:
            raise RuntimeError("not currently recording to the pool")
        self.see(name)
        self.allocating = name == "endAllocateToPool"

    def names(self):
        return [what for what, *_ in self.seen]


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_warm_up_and_capture_are_in_one_stream_on_the_calls_own_device(cuda):
    call = CapturedCall(lambda: cuda.see("run"), CUDA_1)
    other = CapturedCall(lambda: None, CUDA_1)
    for _ in range(5):
        call()
    other()
    assert call.captured
    assert cuda.names() == [*["run"] * 3, "emptied", "begin", "run", "end", "replay", "replay"]
    streams = {stream for what, _, stream, _ in cuda.seen if what != "replay"}
    assert streams == {call._stream} and call._stream is not other._stream
    assert {device for what, device, *_ in cuda.seen if what != "replay"} == {CUDA_1}
    # the graph has its own, neither the warm-up's nor one that calls after it would use
    assert cuda.workspaces_freed_after == ["run", "end"]
    assert cuda.now_stream is cuda.default and cuda.now_device.index == 0


def test_the_collector_rests_during_the_capture_only(cuda):
    call = CapturedCall(lambda: cuda.see("run"), CUDA_1)
    for _ in range(4):
        call()
    assert [on for *_, on in cuda.seen] == [True] * 3 + [False] * 4 + [True]
    assert gc.isenabled()


def test_after_a_capture_that_was_invalidated_the_first_reason_is_told_and_the_stream_is_back(cuda):
    def run():
        cuda.see("run")
        if cuda.names()[-2:-1] == ["begin"]:
            cuda.fails = "CUDA error: operation failed due to a previous error during capture"
            raise RuntimeError("CUDA error: .item() while capturing\nCompile with more")

    call = CapturedCall(run, CUDA_1)
    for _ in range(5):
        call()
    assert call.why_not == "CUDA error: .item() while capturing" and not call.captured
    assert cuda.workspaces_freed_after == ["run", "end"]
    freed = ["reset", "endAllocateToPool", "releasePool", "emptied"]
    assert cuda.names()[-7:] == ["end", *freed, "run", "run"]
    assert cuda.now_stream is cuda.default and cuda.now_device.index == 0
    assert gc.isenabled()
    assert cuda.graphs[0]() is not None, "the allocator still asks it"


@pytest.mark.parametrize("mine, others", [(True, True), (True, False), (False, True)])
def test_a_graph_is_replayed_if_all_processes_have_one(cuda, mine, others):
    asked = []

    def run():
        cuda.see("run")
        if not mine and cuda.names()[-2:-1] == ["begin"]:
            raise RuntimeError("not here")

    call = CapturedCall(run, CUDA_1, agreed=lambda ok: asked.append(ok) or (ok and others))
    for _ in range(5):
        call()
    assert asked == [mine]
    assert call.captured == (mine and others)
    assert cuda.names()[-2:] == (["replay"] if call.captured else ["run"]) * 2
    told = None if call.captured else "another process could not capture it"
    assert call.why_not == (told if mine else "not here")


def test_the_memory_of_a_capture_that_ran_out_of_it_is_free_for_the_eager_call(cuda):
    def run():
        cuda.see("run")
        if cuda.names()[-2:-1] == ["begin"]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    call = CapturedCall(run, CUDA_1)
    for _ in range(4):
        call()
    assert cuda.names()[-4:] == ["end", "reset", "emptied", "run"]
    assert call.why_not == "CUDA out of memory"


def test_after_any_exception_of_a_capture_the_call_goes_on_without_a_graph(cuda):
    """Triton's errors, such as OutOfResources, are no RuntimeErrors."""

    class OutOfResources(Exception):
        pass

    def run():
        cuda.see("run")
        if cuda.names()[-2:-1] == ["begin"]:
            raise OutOfResources("shared memory")

    call = CapturedCall(run, CUDA_1)
    for _ in range(5):
        call()
    assert call.why_not == "OutOfResources: shared memory" and not call.captured
    assert cuda.names()[-5:] == ["end", "reset", "emptied", "run", "run"]
    assert cuda.now_stream is cuda.default and gc.isenabled()


def test_an_error_of_another_kind_ends_the_capture_and_is_raised(cuda):
    def run():
        if cuda.names()[-1:] == ["begin"]:
            raise KeyboardInterrupt

    call = CapturedCall(run, CUDA_1)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(4):
            call()
    assert cuda.names()[-1] == "end" and cuda.now_stream is cuda.default and gc.isenabled()


def test_a_call_that_failed_is_not_counted_as_warm_up(cuda):
    """Other processes, in which it did not fail, would capture one call later."""

    def run():
        cuda.see("run")
        if len(cuda.seen) == 1:
            raise RuntimeError("compiling failed")

    call = CapturedCall(run, CUDA_1)
    with pytest.raises(RuntimeError, match="compiling"):
        call()
    for _ in range(4):
        call()
    assert cuda.names() == [*["run"] * 4, "emptied", "begin", "run", "end", "replay"]


def test_a_forgotten_graph_is_given_back_and_captured_again(cuda):
    call = CapturedCall(lambda: None, CUDA_1)
    call.forget()
    for _ in range(4):
        call()
    call.forget()
    assert not call.captured and cuda.graphs[0]() is None
    call()
    assert cuda.names()[-5:] == ["reset", "emptied", "begin", "end", "replay"]


def test_without_a_capture_everything_stays_in_the_current_stream(cuda):
    call = CapturedCall(lambda: cuda.see("run"), CUDA_1, why_not="not wanted")
    with call.side_stream():
        call()
    assert cuda.seen == [("run", torch.device("cuda", 0), cuda.default, True)]


def test_an_object_that_owns_its_call_is_freed_without_the_collector():
    class Owner:
        def __init__(self):
            self.ran = 0
            self.call = CapturedCall(self.run, CPU)

        def run(self):
            self.ran += 1

    owner = Owner()
    owner.call()
    assert owner.ran == 1
    alive = weakref.ref(owner)
    gc.disable()
    try:
        del owner
        assert alive() is None
    finally:
        gc.enable()
