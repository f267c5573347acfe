"""What a step sends, and how DDP is set up for it: in a group of one rank."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from ddpm_fast.data import open_images
from ddpm_fast.errors import UsageError
from ddpm_fast.runtime.ranks import World, _world_of_environment
from ddpm_fast.train import setup
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.flat_gradients import FlatGradients
from ddpm_fast.train.memory import advice
from ddpm_fast.train.step import TrainStep
from tests.runtime.hook_order import SMALL


@pytest.fixture
def make_shared_step():
    """Make a step of two ranks, of which this is the first; the other is not needed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def make(**changes):
        config = TrainConfig(**SMALL | {"grad_accumulation": 1, **changes})
        images = open_images("digits", data_root=".")
        step = setup.make_step(config, images, torch.device("cpu"), World(0, 2, 0))
        setup.wrap_net(step, lambda line: None)
        return step

    yield make
    dist.destroy_process_group()


@pytest.fixture
def shared_step(make_shared_step):
    return make_shared_step()


def test_the_gradients_lie_in_ddps_buckets_and_its_graph_is_static(shared_step):
    shared = shared_step.forward
    assert shared.static_graph and not shared.find_unused_parameters
    assert shared.gradient_as_bucket_view and not shared.broadcast_buffers
    shared_step(0)
    blocks = {p.grad.untyped_storage().data_ptr() for p in shared_step.parameters}
    assert len(blocks) <= 2 < len(shared_step.parameters)  # views of buckets of 1 and 25 MiB


def test_a_step_sends_one_gradient_and_one_loss_and_never_the_averages(shared_step, monkeypatch):
    sent = []

    def send(_, bucket):
        sent.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def note(tensor, *_, **__):
        sent.append(tensor.nbytes)

    for name in ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce"):
        monkeypatch.setattr(dist, name, note)
    shared_step.forward.register_comm_hook(None, send)
    gradient_bytes = sum(p.nbytes for p in shared_step.parameters)
    for number in range(3):
        sent.clear()
        shared_step(number)
        assert sum(sent) == gradient_bytes + 4  # the loss


def test_a_step_in_two_halves_sends_one_gradient_in_one_piece(shared_step, monkeypatch):
    shared_step(0)
    shared_step.split()
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor.nbytes))
    addresses = [p.grad.data_ptr() for p in shared_step.parameters]
    for number in (1, 2):
        sent.clear()
        shared_step(number)
        assert sent == [sum(p.nbytes for p in shared_step.parameters), 4]  # and the loss
    assert [p.grad.data_ptr() for p in shared_step.parameters] == addresses  # as a graph needs it
    assert all(p.grad.stride() == p.stride() for p in shared_step.parameters)


def test_a_step_whose_capture_failed_within_ddp_is_taken_in_halves(shared_step, monkeypatch):
    ddp, by_ddp = shared_step.forward, []  # held here, as its own hooks would hold it

    def note(state, bucket):
        by_ddp.append(bucket.buffer().nbytes)
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, note)
    shared_step(0)
    by_ddp.clear()
    ddp(torch.zeros(4, 1, 16, 16), torch.zeros(4))  # and never gone back through
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor.nbytes))
    monkeypatch.setattr(type(shared_step), "_is_to_be_split", lambda step: not step.halved)
    for number in (1, 2):
        sent.clear()
        shared_step(number)
        assert sent == [sum(p.nbytes for p in shared_step.parameters), 4]
        assert shared_step.halved and shared_step.loss.isfinite() and not by_ddp


def test_a_rank_out_of_memory_tries_alone_what_fits(shared_step, monkeypatch):
    shared_step(0)
    sent, backward = [], TrainStep.backward

    def limited(self, rows):
        if rows.stop - rows.start > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        backward(self, rows)

    shared_step.forward.register_comm_hook(None, lambda state, bucket: sent.append(bucket))
    monkeypatch.setattr(TrainStep, "backward", limited)
    told = advice(shared_step, resumed=False)  # of 8 images 4 are this rank's
    assert "4 images at a time do not fit on cpu, 1 do (measured)" in told and not sent
    assert "--grad-accumulation 4 trains the same way, --batch-size 2 on smaller batches" in told


def test_gradients_of_two_halves_are_rounded_on_their_way_where_asked(monkeypatch):
    parameters = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(5))]
    gradients, sent = FlatGradients(parameters, 2, torch.bfloat16), []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor.clone()))
    for p in parameters:
        p.grad += 1 / 3
    gradients.send()
    assert sent[0].dtype == torch.bfloat16 and sent[0].numel() == 17
    for p in parameters:
        assert torch.equal(p.grad, torch.full_like(p, 1 / 6).bfloat16().float())
    gradients.zero_()
    assert not any(p.grad.any() for p in parameters)


@pytest.mark.parametrize(
    "flag, device, failed, split",
    [
        ("auto", "cuda", True, True),
        ("auto", "cuda", False, False),
        ("auto", "cpu", True, False),
        ("on", "cuda", True, False),
        ("off", "cuda", True, False),
    ],
)
def test_a_step_is_split_where_ranks_cannot_capture_it_whole(
    make_shared_step, flag, device, failed, split
):
    step = make_shared_step()
    step.config = dataclasses.replace(step.config, cuda_graph=flag)
    step.batches.device = torch.device(device)
    step.call.why_not = "a reason" if failed else None
    assert step._is_to_be_split() == split
    assert step.why_no_graph == (None if split or not failed else "a reason")
    if split:
        step.split()
        assert step.halved and not step.captured and not step._is_to_be_split()


def test_slurms_number_of_a_rank_on_its_machine_will_do(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert _world_of_environment() == World(3, 4, 1)
    monkeypatch.delenv("SLURM_LOCALID")
    with pytest.raises(UsageError, match="LOCAL_RANK is not set, must be a whole number from 0"):
        _world_of_environment()
