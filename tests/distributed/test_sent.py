"""What a step sends, and how DDP is set up for it: in a group of one rank."""

import pytest
import torch
import torch.distributed as dist

from ddpm_fast.data import open_images
from ddpm_fast.distributed import World, _world_of_environment
from ddpm_fast.errors import UsageError
from ddpm_fast.train import setup
from ddpm_fast.train.config import TrainConfig
from tests.distributed.hook_order import SMALL


@pytest.fixture
def shared_step():
    """A step of two ranks, of which this is the first; the other is not needed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = TrainConfig(**SMALL | {"grad_accumulation": 1})
    images = open_images("digits", data_root=".")
    step = setup.make_step(config, images, torch.device("cpu"), World(0, 2, 0))
    setup.wrap_net(step, lambda line: None)
    yield step
    dist.destroy_process_group()


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


def test_slurms_number_of_a_rank_on_its_machine_will_do(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert _world_of_environment() == World(3, 4, 1)
    monkeypatch.delenv("SLURM_LOCALID")
    with pytest.raises(UsageError, match="WORLD_SIZE is 4, but LOCAL_RANK is not set: start with"):
        _world_of_environment()
