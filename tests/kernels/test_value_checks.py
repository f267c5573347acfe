"""Values of tensors are checked where tensors are real: in compiled code, in ops by themselves."""

from types import SimpleNamespace

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.kernels.calling import extension
from ddpm_fast.kernels.posterior_step import checks as posterior_step_checks
from ddpm_fast.kernels.q_sample import checks as q_sample_checks

T = 10
ABAR = (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)
X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
SET = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
FAR = 10**12  # beyond any memory of the process: unchecked, a segmentation fault
GOOD = {"t": torch.tensor([1, 2]), "rows": torch.tensor([0, 7]), "step": torch.tensor(3)}
BAD_OF_Q_SAMPLE = [
    ("t", torch.tensor([0, T]), "t holds 10, must be from 0 to 9"),
    ("t", torch.tensor([-1, FAR]), "t holds -1, must be from 0 to 9"),
    ("rows", torch.tensor([0, 8]), "rows holds 8, must be from 0 to 7"),
    ("rows", torch.tensor([0, FAR]), f"rows holds {FAR}, must be from 0 to 7"),
    ("step", torch.tensor(-1), "step=-1 must satisfy 0 <= step"),
    ("step", torch.tensor(2**32), "step=4294967296 must satisfy"),
]
BAD_OF_POSTERIOR_STEP = [
    ("t", torch.tensor(FAR), f"t holds {FAR}, must be from 0 to 9"),
    ("t", torch.tensor([5, T]), "t holds 10, must be from 0 to 9"),
    ("t_prev", torch.tensor(-2), "t_prev holds -2, must be from -1 to 9"),
    ("t_prev", torch.tensor([FAR, 0]), f"t_prev holds {FAR}, must be from -1 to 9"),
    ("t_prev", torch.tensor([2, 5]), "t_prev=5 must be less than t=5"),
    ("seed", torch.tensor(-1), "seed=-1 must satisfy 0 <= seed"),
    ("first_index", torch.tensor(2**32 - 1), r"first_index=4294967295 \+ 2 samples"),
]


def q_sample(t, rows, step):
    return ops.q_sample(SET, t, ABAR, rows=rows, seed=1, step=step)


def posterior_step(t, t_prev, seed, first_index):
    return ops.posterior_step(
        X, X.flip(0), t, ABAR, t_prev=t_prev, seed=seed, step=2, first_index=first_index
    )


@pytest.fixture(scope="module")
def compiled():
    """The two functions, compiled at their first call."""
    torch._dynamo.reset()
    options = {"backend": "aot_eager", "fullgraph": True, "dynamic": False}
    return {
        function.__name__: torch.compile(function, **options)
        for function in (q_sample, posterior_step)
    }


@pytest.mark.parametrize(("name", "value", "message"), BAD_OF_Q_SAMPLE)
def test_compiled_q_sample_refuses_what_the_eager_one_does(compiled, name, value, message):
    compiled["q_sample"](**GOOD)
    for function in (q_sample, compiled["q_sample"]):
        with pytest.raises(ValueError, match=message):
            function(**(GOOD | {name: value}))


@pytest.mark.parametrize(("name", "value", "message"), BAD_OF_POSTERIOR_STEP)
def test_compiled_posterior_step_refuses_what_the_eager_one_does(compiled, name, value, message):
    given = {"t": torch.tensor(5), "t_prev": torch.tensor(3)}
    given |= {"seed": torch.tensor(1), "first_index": torch.tensor(0)}
    compiled["posterior_step"](**given)
    for function in (posterior_step, compiled["posterior_step"]):
        with pytest.raises(ValueError, match=message):
            function(**(given | {name: value}))


def test_compiled_with_counters_out_of_range_dropout_and_words_are_refused_too():
    def draw(rng, counter):
        return ops.dropout(X, 0.5, rng, 16), ops.philox_words(counter, torch.tensor([1, 2]))

    torch._dynamo.reset()
    traced = torch.compile(draw, backend="aot_eager", fullgraph=True)
    rng, counter = torch.tensor([1, 2, 3]), torch.arange(4)
    traced(rng, counter)
    with pytest.raises(ValueError, match="seed=-1 must satisfy"):
        traced(torch.tensor([-1, 2, 3]), counter)
    with pytest.raises(ValueError, match="counter holds -4, values must be in"):
        traced(rng, counter - 4)


def op_q_sample(**changes):
    arguments = {
        "x_0": X, "rows": None, "alphas_cumprod": ABAR, "t": GOOD["t"], "noise": None, "seed": 1,
        "seed_at": None, "step": 2, "step_at": None, "first_index": 3, "first_index_at": None,
        "flip": False, "prediction": "v", "out_dtype": torch.float32,
        "target_dtype": torch.float32, "channels_last": False,
    }  # fmt: skip
    return torch.ops.ddpm_fast.q_sample(*(arguments | changes).values())


def op_arguments(**changes):
    return {
        "x_t": X, "model_output": X.flip(0), "unconditional": None, "guidance": 1.0,
        "alphas_cumprod": ABAR.clone(), "t": 5, "t_at": None, "t_prev": 3, "t_prev_at": None,
        "eta": None, "variance": "fixed_large", "prediction": "eps", "clip": True,
        "dynamic_threshold": None, "recompute_eps": True, "noise": None, "seed": 1,
        "seed_at": None, "step": 2, "step_at": None, "first_index": 3, "first_index_at": None,
    } | changes  # fmt: skip


def test_ops_called_by_themselves_refuse_values_out_of_range():
    for name, message in (("t", "t holds"), ("rows", "rows holds")):
        with pytest.raises(ValueError, match=message):
            op_q_sample(**{name: torch.tensor([0, FAR])})
    for changes, message in [
        ({"t": FAR}, f"t={FAR} must be from 0 to 9"),
        ({"t_prev": -2}, "t_prev=-2 must be from -1 to 9"),
        ({"t_at": torch.tensor(FAR)}, f"t holds {FAR}"),
        ({"t_prev": None, "t_prev_at": torch.tensor(FAR)}, f"t_prev holds {FAR}"),
        ({"step_at": torch.tensor(-1)}, "step=-1 must satisfy"),
    ]:
        with pytest.raises(ValueError, match=message):
            torch.ops.ddpm_fast.posterior_step(*op_arguments(**changes).values(), None)


# What else an output may overlap


def number_in(memory, value):
    """() int64 in the first 8 bytes of an output's memory."""
    return memory.view(torch.int64).flatten()[0].fill_(value)


@pytest.mark.parametrize("name", ["t", "t_prev", "seed", "step", "first_index"])
@pytest.mark.parametrize("which", [0, 1])
def test_outputs_over_times_and_counters_are_refused(name, which):
    out = (torch.empty_like(X), torch.empty_like(X))
    number = number_in(out[which], 5 if name == "t" else 3)
    message = rf"out\[{which}\] \(x_\w+\) overlaps {name} in memory"
    given = {"t": 5, "t_prev": 3} | {name: number}
    for impl in ("fused", "reference"):
        with pytest.raises(ValueError, match=message):
            ops.posterior_step(X, X.flip(0), alphas_cumprod=ABAR, out=out, impl=impl, **given)
    arguments = op_arguments(**{f"{name}_at": number})
    arguments |= {"t_prev": None} if name == "t_prev" else {}
    with pytest.raises(ValueError, match=message):
        torch.ops.ddpm_fast.posterior_step_out(*arguments.values(), *out, None)


def test_an_output_over_the_table_is_refused():
    memory = torch.zeros(X.numel(), dtype=torch.float64)
    memory[:T] = ABAR
    table, x_prev = memory[:T], memory.view(torch.float32)[: X.numel()].view(X.shape)
    message = r"out\[0\] \(x_prev\) overlaps alphas_cumprod in memory"
    with pytest.raises(ValueError, match=message):
        ops.posterior_step(X, X.flip(0), 5, table, out=(x_prev, torch.empty_like(X)))
    arguments = op_arguments(alphas_cumprod=table)
    with pytest.raises(ValueError, match=message):
        torch.ops.ddpm_fast.posterior_step_out(
            *arguments.values(), x_prev, torch.empty_like(X), None
        )


def test_an_op_whose_output_overlaps_an_image_is_refused():
    arguments = op_arguments()
    with pytest.raises(ValueError, match=r"out\[1\] \(x_0\) overlaps x_t in memory"):
        torch.ops.ddpm_fast.posterior_step_out(*arguments.values(), torch.empty_like(X), X, None)


# Once a path, and when


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("requires_grad", [False, True])  # through the dispatcher
def test_eager_values_are_read_once(monkeypatch, impl, requires_grad):
    reads = []
    check = q_sample_checks.check_values

    def counted(name, index, low, end):
        reads.append(name)
        check(name, index, low, end)

    for module in (q_sample_checks, posterior_step_checks):
        monkeypatch.setattr(module, "check_values", counted)
    noise = torch.zeros(2, 3, 4, 4, requires_grad=requires_grad)
    ops.q_sample(SET, GOOD["t"], ABAR, rows=GOOD["rows"], noise=noise, impl=impl)
    times = {"t": torch.tensor(5), "t_prev": torch.tensor(3)}
    ops.posterior_step(X, X.flip(0), alphas_cumprod=ABAR, noise=noise, impl=impl, **times)
    assert reads == ["rows", "t", "t", "t_prev"]


class OnDevice:
    """As much of a tensor as the rule looks at."""

    def __init__(self, type):
        self.device = SimpleNamespace(type=type)


def test_values_may_be_read_on_the_cpu_and_on_cuda_when_asked_outside_a_capture(monkeypatch):
    monkeypatch.setattr(extension, "PLAIN_TENSORS", (OnDevice,))
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.delenv("DDPM_FAST_CHECK", raising=False)
    cpu, cuda, meta = (OnDevice(type) for type in ("cpu", "cuda", "meta"))
    assert extension.may_read(cpu) and not extension.may_read(cuda)
    for asked, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("DDPM_FAST_CHECK", asked)
        assert extension.may_read(cpu) and not extension.may_read(meta)
        assert extension.may_read(cuda) is extension.may_read(cuda, None, cuda) is expected
    capturing = True
    assert not extension.may_read(cuda) and extension.may_read(cpu)
    capturing = False
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not extension.may_read(cpu) and not extension.may_read(cuda)


def test_values_of_subclasses_and_under_a_mode_are_not_read():
    from torch.utils.flop_counter import FlopCounterMode

    class Subclass(torch.Tensor):
        pass

    assert extension.may_read(X) and extension.may_read(torch.nn.Parameter(X))
    assert not extension.may_read(X.as_subclass(Subclass))
    assert not extension.may_read(X, None, X.as_subclass(Subclass))
    with FlopCounterMode(display=False):
        assert not extension.may_read(X) and not extension.may_launch(X)
    assert extension.may_launch(X)
