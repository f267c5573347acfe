"""Clip, AdamW and averages in three launches: against fp64, torch's optimizer, ddpm_fast.EMA.

Without a GPU the kernels run in Triton's interpreter.
"""

import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn

import ddpm_fast as df
from ddpm_fast.kernels.adamw_ema import op as kernel
from ddpm_fast.kernels.adamw_ema.launch import Numbers, Tables
from ddpm_fast.optim.fused_adamw import FusedAdamW

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = kernel.SPEC
SMALL = [case for case in SPEC.cases if case.small]
SHAPES = ((5, 7), (3,), (4, 2, 3, 3), (1,))
PAD = 64
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def distance(found, expected):
    far = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300)
    return far.item()


def drawn(shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE)


def parameters(shapes=SHAPES, dtype=torch.float32):
    return [nn.Parameter(drawn(shape, i).to(dtype)) for i, shape in enumerate(shapes)]


def give_gradients(params, step, scale=1.0):
    for i, p in enumerate(params):
        p.grad = torch.empty_like(p).copy_(drawn(p.shape, 1000 * step + i, scale))


def ours(params, **options):
    return FusedAdamW(params, **{"lr": 1e-2, "weight_decay": 0.1, "impl": "fused", **options})


def copies(params):
    return [p.detach().clone() for p in params]


def everything(params, optimizer, *others):
    """Copies of weights, state and other tensors."""
    state = [t for p in params for t in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*params, *state, *others)]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_kernels_are_the_reference(case):
    inputs = SPEC.make_inputs(case.values, torch.float32, DEVICE, 0)
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    before = inputs["weights"].double()
    found, expected = SPEC.fused(**inputs), SPEC.reference(**exact)
    for mine, theirs in zip(found, expected, strict=True):
        assert distance(mine, theirs) < SPEC.tolerance[torch.float32]
    # the change itself: weights near 1 are rounded to 6e-8, it is 1e-2
    assert distance(found[0].double() - before, expected[0] - before) < 1e-5


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_hundred_steps_are_torchs(weight_decay):
    """Ours is as near to AdamW in fp64 as torch's in fp32: at most twice as far, or below 1e-6."""
    shapes = SHAPES[:2]
    mine, theirs = parameters(shapes), parameters(shapes)
    exact = parameters(shapes, torch.float64)
    optimizers = [
        ours(mine, weight_decay=weight_decay),
        *(torch.optim.AdamW(p, lr=1e-2, weight_decay=weight_decay) for p in (theirs, exact)),
    ]
    for step in range(100):
        for params in (mine, theirs, exact):
            give_gradients(params, step)
        optimizers[0].step(max_norm=3.0)
        for params, optimizer in zip((theirs, exact), optimizers[1:], strict=True):
            nn.utils.clip_grad_norm_(params, 3.0)
            optimizer.step()
    for a, b, e in zip(mine, theirs, exact, strict=True):
        assert distance(a, e) < max(1e-6, 2 * distance(b, e))
        for key in ("exp_avg", "exp_avg_sq"):
            wanted = optimizers[2].state[e][key]
            torchs = distance(optimizers[1].state[b][key], wanted)
            assert distance(optimizers[0].state[a][key], wanted) < max(1e-6, 2 * torchs)
        assert optimizers[0].state[a]["step"] == 100


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6, math.inf])
def test_the_clip_is_clip_grad_norms(max_norm):
    """Moments after the first step are the clipped gradient: exp_avg = (1 - beta1) g."""
    params = parameters()
    optimizer = ours(params)
    give_gradients(params, 0)
    optimizer.step(max_norm=max_norm)
    norm = nn.utils.clip_grad_norm_(params, max_norm)
    assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for p in params:
        assert distance(optimizer.state[p]["exp_avg"] / 0.1, p.grad) < 1e-6


def test_averages_are_those_of_ema():
    """Several decays; one of them due every third step only."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1)).to(DEVICE)
    emas, plain = ([df.EMA(net, decay) for decay in (0.9, 0.5)] for _ in range(2))
    params, optimizer = list(net.parameters()), ours(net.parameters())
    averages = [list(ema.net.parameters()) for ema in emas]
    for step in range(6):
        give_gradients(params, step)
        weights = torch.tensor([0.1, 0.5 if step % 3 == 2 else 0.0], device=DEVICE)
        optimizer.step(emas=averages, ema_weights=weights)
        plain[0].update(net)
        if step % 3 == 2:
            plain[1].update(net)
        for mine, theirs in zip(emas, plain, strict=True):
            for a, b in zip(mine.net.parameters(), theirs.net.parameters(), strict=True):
                assert distance(a, b) < 1e-6


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing_if_such_steps_are_skipped(bad, impl):
    params = parameters()
    optimizer, ema = ours(params, impl=impl), copies(params)
    step = dict(max_norm=1.0, emas=[ema], ema_weights=torch.full((1,), 0.5, device=DEVICE))
    give_gradients(params, 0)
    optimizer.step(**step, skip_nonfinite=True)
    assert optimizer.applied == 1
    before = everything(params, optimizer, *ema)
    give_gradients(params, 1)
    params[2].grad[1, 0, 2, 1] = bad
    optimizer.step(**step, skip_nonfinite=True)
    assert optimizer.applied == 0 and not optimizer.grad_norm.isfinite()
    for a, b in zip(everything(params, optimizer, *ema), before, strict=True):
        assert torch.equal(a, b)
    optimizer.step(**step)  # as torch: the NaN spreads
    assert optimizer.applied == 1 and params[2].isnan().any()


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_first_step_that_is_skipped_leaves_the_state_new(impl):
    params = parameters()
    optimizer = ours(params, impl=impl)
    before = copies(params)
    give_gradients(params, 0, math.inf)
    optimizer.step(skip_nonfinite=True)
    for p, b in zip(params, before, strict=True):
        assert torch.equal(p, b)
        assert all(not t.any() for t in optimizer.state[p].values())


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_found_inf_refuses_a_step_as_in_torch(impl):
    params = parameters()
    optimizer = ours(params, impl=impl)
    give_gradients(params, 0)
    optimizer.step()
    optimizer.found_inf = torch.ones((), device=DEVICE)
    before = everything(params, optimizer)
    optimizer.step()
    assert optimizer.applied == 0 and optimizer.grad_norm.isfinite()
    for a, b in zip(everything(params, optimizer), before, strict=True):
        assert torch.equal(a, b)
    optimizer.found_inf.zero_()
    optimizer.step()
    assert optimizer.applied == 1 and optimizer.state[params[0]]["step"] == 2


def padded(tensor, offset):
    """A tensor of the same shape and layout `offset` elements into a buffer full of NaN."""
    flat = torch.full((tensor.numel() + 2 * PAD,), math.nan, device=DEVICE)
    view = flat.as_strided(tensor.shape, tensor.stride(), PAD + offset)
    return flat, view.copy_(tensor)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("shapes", [SHAPES, ((8192 + 5,), (0,), (8192,))], ids=["odd", "chunks"])
def test_tensors_anywhere_in_memory_are_updated_and_nothing_beside_them(shapes, offset):
    """NaN all around: what is read beyond a tensor would spread, what is written would show."""
    plain, params, flats, ema = parameters(shapes), [], [], []
    averages = copies(plain)
    for p, average in zip(plain, averages, strict=True):
        for kind, tensor in (("weight", p.detach()), ("grad", p.detach()), ("ema", average)):
            flat, view = padded(tensor, offset)
            flats.append((flat, view))
            if kind == "weight":
                params.append(nn.Parameter(view))
            elif kind == "grad":
                params[-1].grad = view
            else:
                ema.append(view)
    give_gradients(plain, 0)
    for p, q in zip(params, plain, strict=True):
        p.grad.copy_(q.grad)
    weights = torch.full((1,), 0.25, device=DEVICE)
    ours(params).step(max_norm=1.0, emas=[ema], ema_weights=weights)
    ours(plain).step(max_norm=1.0, emas=[averages], ema_weights=weights)
    for found, expected in zip((*params, *ema), (*plain, *averages), strict=True):
        assert torch.equal(found, expected)
    for flat, view in flats:
        assert flat.isfinite().sum() == view.numel() and view.isfinite().all()


def test_channels_last_parameters_are_updated_in_their_own_order():
    """Loaded moments of another layout are brought into it; gradients of another are refused."""
    plain, optimizers = parameters(((4, 2, 3, 3), (2, 3, 1, 1))), []
    turned = [nn.Parameter(p.detach().to(memory_format=torch.channels_last)) for p in plain]
    for params in (plain, turned):
        optimizers.append(ours(params))
        give_gradients(params, 0)
        optimizers[-1].step()
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for params, optimizer in zip((plain, turned), optimizers, strict=True):
        give_gradients(params, 1)
        optimizer.step()
    for p, q in zip(plain, turned, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizers[0].state[p]["exp_avg_sq"],
                           optimizers[1].state[q]["exp_avg_sq"])  # fmt: skip
    assert optimizers[1].state[turned[0]]["exp_avg"].stride() == turned[0].stride()
    turned[0].grad = plain[0].grad.clone()
    with pytest.raises(ValueError, match="gradient of parameter 0 has strides"):
        optimizers[1].step()


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's order of programs")
def test_order_of_programs_does_not_matter(monkeypatch):
    from triton.runtime import interpreter

    values = dict(sizes=(8200, 5, 1), num_emas=1)
    expected = SPEC.fused(**SPEC.make_inputs(values, torch.float32, DEVICE, 0))
    builder, visited = interpreter.interpreter_builder, []

    def reversed_index(x, y, z):
        visited.append(x)
        type(builder).set_grid_idx(builder, builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", reversed_index)
    found = SPEC.fused(**SPEC.make_inputs(values, torch.float32, DEVICE, 0))
    assert len(visited) == 4 + 1 + 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_tables_are_copied_again_only_when_something_moved(monkeypatch):
    params = parameters()
    optimizer = ours(params)
    give_gradients(params, 0)
    optimizer.step()
    (tables,) = optimizer._tables.values()
    host_rows, copied = tables._host_rows, []
    monkeypatch.setattr(tables, "_host_rows", lambda: copied.append(1) or host_rows())
    optimizer.step()
    assert copied == []
    params[1].grad = params[1].grad.clone()
    optimizer.step()
    assert copied == [1]
    optimizer.param_groups[0]["weight_decay"] = 0.2
    optimizer.step()
    assert copied == [1, 1] and len(optimizer._tables) == 1


def test_captures_find_their_rows_memory_ready(monkeypatch):
    """Pinned memory cannot be had while a graph is captured, and each graph keeps its own."""
    tables = Tables((4,), 0, torch.zeros(4, device=DEVICE))
    numbers, host_rows = [Numbers(0.9, 0.999, 1e-8, 0.0)], tables._host_rows
    capturing, made = [], []
    monkeypatch.setattr(tables, "_host_rows", lambda: made.append(bool(capturing)) or host_rows())
    for address in range(0, 96, 16):
        eager = address % 48 == 32  # two captures, a step, two captures, a step
        capturing[:] = [] if eager else [1]
        tables.point([[address] * 6], numbers, capturing=not eager)
        assert tables.rows[0, 0] == address
    assert True not in made
    assert len({rows.data_ptr() for rows in tables._captured}) == 4


def test_the_benchmarks_sizes_are_the_cifar10_presets():
    with torch.device("meta"):
        net = df.UNet.from_preset("cifar10")
    sizes = Counter(p.numel() for p in net.parameters())
    assert Counter(kernel.CIFAR10_SIZES) == sizes
    values = dict(sizes=kernel.CIFAR10_SIZES, num_emas=1)
    assert SPEC.bytes_moved(values, torch.float32, False) == 40 * 35_746_307


class TestOnTheDevice:
    pytestmark = gpu

    @pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
    def test_kernels_are_the_reference_at_every_size(self, case):
        for seed in range(3):
            inputs = SPEC.make_inputs(case.values, torch.float32, DEVICE, seed)
            exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            for a, b in zip(SPEC.fused(**inputs), SPEC.reference(**exact), strict=True):
                assert distance(a, b) < SPEC.tolerance[torch.float32]

    @pytest.mark.parametrize("set_to_none", [False, True])
    def test_a_captured_step_gives_the_eager_bits(self, set_to_none):
        """Gradients made inside the graph too, so that their addresses are the graph's own."""
        runs = []
        for graphed in (False, True):
            params = parameters((*SHAPES, (100, 200)))
            inputs = [torch.zeros_like(p) for p in params]
            lr = torch.tensor(1e-2, device=DEVICE)
            optimizer, ema = ours(params, lr=lr), copies(params)
            ema_weights = torch.zeros(1, device=DEVICE)

            def step(
                params=params, inputs=inputs, optimizer=optimizer, ema=ema, weights=ema_weights
            ):
                optimizer.zero_grad(set_to_none=set_to_none)
                sum((p * x).sum() for p, x in zip(params, inputs, strict=True)).backward()
                optimizer.step(max_norm=1.0, emas=[ema], ema_weights=weights, skip_nonfinite=True)

            run, graph = step, torch.cuda.CUDAGraph()
            for k in range(12):
                for i, x in enumerate(inputs):
                    x.copy_(drawn(x.shape, 100 * k + i, math.inf if k == 8 else 1.0))
                lr.fill_(1e-2 / (1 + k))
                ema_weights.fill_(0.1 if k % 2 else 0.0)
                if k == 5 and graphed:
                    with torch.cuda.graph(graph):
                        step()
                    run = graph.replay
                (step if k == 10 else run)()  # an eager step between replays
            torch.cuda.synchronize()
            runs.append(everything(params, optimizer, *ema, optimizer.grad_norm))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_a_step_does_not_wait_for_the_device(self):
        params = parameters()
        optimizer, ema = ours(params), copies(params)
        weights = torch.full((1,), 0.1, device=DEVICE)
        give_gradients(params, 0)
        optimizer.step(max_norm=1.0, emas=[ema], ema_weights=weights)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                for p in params:
                    p.grad = p.grad.clone()
                optimizer.step(max_norm=1.0, emas=[ema], ema_weights=weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_the_first_step_of_all_cannot_be_captured(self):
        params = parameters()
        give_gradients(params, 0)
        optimizer = ours(params)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(graph):
            optimizer.step()
        optimizer.step()
        assert optimizer.applied == 1
