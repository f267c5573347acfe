"""A run does not depend on how many ranks it is cut into."""

import json
import re
import shutil

import pytest
import torch

from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.data import open_images
from ddpm_fast.runtime.ranks import ALONE
from ddpm_fast.train.__main__ import main
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.setup import make_step
from tests.runtime import two_halves
from tests.runtime.hook_order import SMALL

FLAGS = ("--iterations", 8, "--log-every", 2, "--sample-every", 0, "--checkpoint-every", 4,
         "--dropout", 0.2, "--use-labels", "--flip", "on", "--learning-rate", 0.01,
         "--warmup-steps", 0, "--lr-schedule", "constant")  # fmt: skip
TRAIN = ("-m", "ddpm_fast.train")
CPU = torch.device("cpu")


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def weights(folder, step=8):
    parts = checkpoint.load(folder / "checkpoints" / f"step_{step:08d}").parts
    return {f"{part}.{name}": t for part in parts for name, t in parts[part].items()}


def assert_same_run(found, expected):
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def one_rank(train_tiny):
    return train_tiny(*FLAGS)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_losses_are_those_of_one_process(run_ranks, tmp_path, tiny, one_rank, ranks):
    """Of the 8 images of a step, three ranks take 2, 3 and 3."""
    output = run_ranks(ranks, *TRAIN, *tiny, *FLAGS, "--run-dir", tmp_path / "run")
    assert f"on {ranks} processes (cpu)" in output
    assert output.count("finished 8 steps") == 1  # rank 0 alone talks
    uneven = "8 images a step: 3 on 2 of the processes, 2 on the others"
    assert output.count(uneven) == (ranks == 3)
    assert re.search(r"step 2/8 .* img/s \(\d+ each\)", output)
    assert_same_run(tmp_path / "run", one_rank)


def test_parts_of_the_batch_give_the_same_losses(run_ranks, tmp_path, tiny, one_rank):
    flags = (*FLAGS, "--grad-accumulation", 2)
    run_ranks(2, *TRAIN, *tiny, *flags, "--run-dir", tmp_path / "run")
    assert_same_run(tmp_path / "run", one_rank)


def test_a_batch_size_per_gpu_is_multiplied(run_ranks, tmp_path, tiny, one_rank):
    flags = (*FLAGS, "--batch-size-per-gpu", 4)
    run_ranks(2, *TRAIN, *tiny, *flags, "--run-dir", tmp_path / "run")
    assert_same_run(tmp_path / "run", one_rank)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["batch_size"] == 8 and config["batch_size_per_gpu"] is None


def test_restarted_on_fewer_ranks_a_run_keeps_its_batch_whatever_the_flag_would_make_it(
    tmp_path, tiny, one_rank, capsys
):
    """As torchrun restarts the command after the loss of a node, which cannot leave out a flag."""
    flags = [str(word) for word in (*tiny, *FLAGS, "--run-dir", tmp_path / "run")]
    assert main([*flags, "--batch-size-per-gpu", "8", "--iterations", "4"]) == 0
    capsys.readouterr()
    again = [*flags, "--batch-size-per-gpu", "4"]  # of two ranks
    assert main([*again, "--auto-resume"]) == 0
    told = "--batch-size-per-gpu 4 is left out: on 1 processes the run keeps its 8 images a step"
    assert told in capsys.readouterr().out
    assert_same_run(tmp_path / "run", one_rank)


@pytest.mark.parametrize("first, then", [(2, 1), (1, 3)])
def test_a_run_resumed_on_another_number_of_ranks_ends_alike(
    run_ranks, tmp_path, tiny, one_rank, first, then
):
    run = tmp_path / "run"
    start = [*tiny, *FLAGS, "--iterations", 4, "--run-dir", run]
    for ranks, argv in ((first, start), (then, ["--resume", run, "--iterations", 8])):
        if ranks == 1:
            assert main([str(word) for word in argv]) == 0
        else:
            run_ranks(ranks, *TRAIN, *argv)
    assert_same_run(run, one_rank)


PLAIN_DDP = """
import torch, torch.distributed as dist
import ddpm_fast as df

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank() + 5)
net = df.UNet(img_channels=1, base_channels=8, channel_mults=(1,), num_res_blocks=1,
              time_emb_dim=8, num_groups=4, attention_resolutions=(), dropout=0.5)
shared = torch.nn.parallel.DistributedDataParallel(net)
for _ in range(3):
    shared(torch.zeros(2, 1, 8, 8), torch.tensor([1, 2])).sum().backward()
print("rng", *net.rng.tolist())
del shared  # its tensors, before gloo's threads end
dist.barrier()
dist.destroy_process_group()
"""


def test_one_of_the_ranks_is_profiled_and_the_others_wait_for_it(
    run_ranks, tmp_path, tiny, one_rank
):
    run = tmp_path / "run"
    output = run_ranks(2, *TRAIN, *tiny, *FLAGS, "--run-dir", run, "--profile", 2)
    assert output.count("profile of steps 4 to 5: ") == 1 and len(list(run.glob("profile/*"))) == 3
    assert_same_run(run, one_rank)


def test_in_a_loop_of_ones_own_each_rank_keeps_its_dropout_masks(run_ranks, tmp_path):
    (tmp_path / "plain.py").write_text(PLAIN_DDP)
    output = run_ranks(2, tmp_path / "plain.py")
    assert "rng 5 3 0" in output and "rng 6 3 0" in output


def test_what_the_ranks_cannot_do_is_refused(run_ranks, tmp_path, tiny):
    for flags, told in [
        (
            ("--batch-size", 1),
            "--batch-size 1 over 2 processes: each needs an image; allowed: at most 1 processes",
        ),
        (("--grad-compression", "bf16"), "--grad-compression bf16 is for CUDA; on cpu: none"),
    ]:
        argv = (*TRAIN, *tiny, *flags, "--run-dir", tmp_path / "run")
        assert told in run_ranks(2, *argv, code=1)  # torchrun's own code
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [2, 3])
def test_images_have_the_same_bits_for_any_number_of_ranks(run_ranks, tmp_path, one_rank, ranks):
    from ddpm_fast.sample import main as sample

    argv = ["--checkpoint", one_rank, "--num-images", 10, "--batch-size", 3, "--steps", 3,
            "--device", "cpu", "--npz"]  # fmt: skip
    assert sample([str(word) for word in (*argv, "--out", tmp_path / "one")]) == 0
    if ranks == 3:  # of the four batches the second is there already
        (tmp_path / "many").mkdir()
        for name in ("samples.json", *(f"0000000{number}.png" for number in (3, 4, 5))):
            shutil.copy(tmp_path / "one" / name, tmp_path / "many" / name)
    output = run_ranks(ranks, "-m", "ddpm_fast.sample", *argv, "--out", tmp_path / "many")
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "many" / path.name).read_bytes() == path.read_bytes(), path.name
    assert f"{10 if ranks == 2 else 7} images drawn" in output


def test_gradients_are_sent_while_the_backward_pass_goes_on_compiled_or_not(run_ranks):
    """With two parts of the batch, averages and, compiled, the net split at its buckets."""
    losses = []
    for how in ("eager", "compiled"):
        output = run_ranks(2, "-m", "tests.runtime.hook_order", how).splitlines()
        (events,) = (line.split()[1:] for line in output if line.startswith("events"))
        last_part = events[events.index("first_layer") + 1 :]  # the first one's is not sent
        assert last_part.count("sent") >= 3
        assert last_part.index("sent") < last_part.index("first_layer") - 1, last_part
        losses += [float(line.split()[1]) for line in output if line.startswith("loss")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("how", [("norm", "split"), ("block", "whole")])
def test_a_compiled_net_that_recomputes_stays_compiled_under_ddp(run_ranks, how):
    """Whole: as by a torch whose DDP cannot split it."""
    output = run_ranks(2, "-m", "tests.runtime.hook_order", "compiled", *how)
    step = make_step(TrainConfig(**SMALL), open_images("digits", data_root="."), CPU)
    for number in range(3):
        step(number)
    assert float(re.search(r"^loss (.*)$", output, re.M)[1]) == pytest.approx(
        step.loss.item(), rel=1e-5
    )
    assert re.search(r"^graphs [1-9]", output, re.M)
    assert ("--recompute block: " in output) == (how[1] == "whole")


@pytest.mark.parametrize(
    "optimizer, how", [("adam", "eager"), ("adam", "compiled"), ("adamw-one-pass", "eager")]
)
def test_a_step_in_two_halves_goes_on_as_the_whole_one(run_ranks, optimizer, how):
    """After two steps of DDP, of parts each; as one process, which needs neither."""
    output = run_ranks(2, "-m", "tests.runtime.two_halves", optimizer, how)
    (found,) = (json.loads(line[6:]) for line in output.splitlines() if line.startswith("found"))
    expected = two_halves.losses(ALONE, optimizer)
    for ours, one_process in zip(found, expected, strict=True):
        assert ours == pytest.approx(one_process, rel=1e-5)
