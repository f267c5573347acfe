"""What W&B and TensorBoard are given; both are replaced by ones that note it."""

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from ddpm_fast.errors import Failure
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.trackers import open_trackers

FLAGS = ("--iterations", 8, "--checkpoint-every", 3, "--log-every", 1, "--sample-every", 0)


@pytest.fixture
def runs(monkeypatch):
    """W&B's server: id -> the steps of the rows that it took, as it takes them."""
    taken = {}

    def init(*, id, resume, **_):
        rows = taken.setdefault(id, [])
        assert resume == "allow"
        run = SimpleNamespace(step=rows[-1] + 1 if rows else 0)

        def log(values, step):
            assert step >= run.step, "W&B warns and drops it"
            rows.append(step)
            run.step = step

        run.log = log
        return run

    module = ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return taken


def test_each_run_folder_has_an_id_of_its_own_at_wandb_and_keeps_it(runs, tmp_path):
    folders = [tmp_path / "exp1" / "run", tmp_path / "exp2" / "run", tmp_path / "lr:1e-3#?\udcff"]
    for folder in folders:
        open_trackers(TrainConfig(wandb=True), folder)
    assert len(runs) == 3
    assert all(re.fullmatch(r"[0-9a-z]+", name) for name in runs)
    for folder in folders:
        open_trackers(TrainConfig(wandb=True), folder)
    assert len(runs) == 3


def test_a_run_that_was_killed_goes_on_in_its_wandb_run_without_a_row_twice(
    train_until_killed, resume, tmp_path, runs
):
    train_until_killed(5, tmp_path / "run", *FLAGS, "--wandb")
    ((name, rows),) = runs.items()
    assert rows == [1, 2, 3, 4, 5]
    assert resume(tmp_path / "run") == 0
    assert runs == {name: [1, 2, 3, 4, 5, 6, 7, 8]}


def test_tensorboard_hides_the_rows_that_a_killed_run_takes_again(
    train_until_killed, resume, tmp_path, monkeypatch
):
    writers = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path / "run" / "tensorboard")
            self.purge_step, self.steps = purge_step, []
            writers.append(self)

        def add_scalar(self, name, value, step):
            self.steps += [step] * (name == "loss")

        def flush(self):
            pass

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train_until_killed(5, tmp_path / "run", *FLAGS, "--tensorboard")
    assert resume(tmp_path / "run") == 0
    first, second = writers
    assert first.steps == [1, 2, 3, 4, 5]
    assert second.purge_step == second.steps[0] <= 6 and second.steps[-1] == 8


def test_a_tracker_that_does_not_start_is_a_failure_and_one_that_fails_later_is_left_out(
    runs, tmp_path, train, capsys, monkeypatch
):
    def fail(*_, **__):
        raise RuntimeError("api_key not configured")

    wandb = sys.modules["wandb"]
    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", fail)
        with pytest.raises(Failure, match="--wandb does not start: api_key not configured"):
            open_trackers(TrainConfig(wandb=True), tmp_path / "none")
    monkeypatch.setattr(wandb, "init", lambda **_: SimpleNamespace(log=fail))
    assert train(tmp_path / "run", *FLAGS[:2], *FLAGS[4:], "--wandb") == 0
    out = capsys.readouterr().out
    assert out.count("warning: a tracker failed and is left out: wandb: api_key not") == 1
