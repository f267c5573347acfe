"""Calls every function of the extension's CPU part on buffers of exactly the size they need.

    python sanitizer_driver.py PATH_OF_C [overrun]

Needs NumPy only. The sanitizers report a byte read or written outside; what this asserts is that
every output is written, and has the same bits at every instruction set and number of threads.
"""

import itertools
import sys
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np

SIZES = (1, 3, 4, 5, 127, 511, 512, 513, 4095, 4096, 4097)
NUM_TIMESTEPS = 10
EPS, X_0, V = PREDICTIONS = range(3)
FIXED_LARGE, FIXED_SMALL, LEARNED, LEARNED_RANGE = range(4)
DTYPE_CODES = {"float32": 0, "float64": 1, "uint8": 4}
COUNTERS = {"seed": 2**63 - 1, "step": 2**32 - 1, "first_index": 2**32 - 2}

random = np.random.default_rng(0)


def load(path):
    spec = spec_from_file_location("_C", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def empty(count, offset=0, dtype=np.float32):
    """`count` poisoned values that end where their memory ends, and start `offset` values in."""
    values = np.empty(count + offset, dtype)
    values[:] = np.nan if values.dtype.kind == "f" else -1
    return values[offset:]


def filled(values, offset=0):
    """A copy of the values in memory of its own."""
    values = np.asarray(values)
    out = np.empty(values.size + offset, values.dtype)[offset:]
    out[:] = values.ravel()
    return out


def normal(count, offset=0, dtype=np.float32):
    return filled(random.standard_normal(count).astype(dtype), offset)


def at(array):
    return 0 if array is None else array.ctypes.data


def table():
    betas = np.linspace(1e-4, 0.3, NUM_TIMESTEPS)
    return filled(np.cumprod(1 - betas))


def counters(on_device):
    """The integers as they are, or as addresses of them; the arrays are returned to be kept."""
    held = {name: filled(np.array([value % 2**63])) for name, value in COUNTERS.items()}
    arguments = {}
    for name, value in COUNTERS.items():
        arguments[name] = 0 if on_device else value
        arguments[f"{name}_at"] = at(held[name]) if on_device else 0
    return arguments, held


def same_on_every_path(cpu, run, thread_counts=(1,)):
    """run(threads) -> outputs; asserts that they are written, and equal on all paths."""
    first = None
    for level, threads in itertools.product(cpu.simd_levels(), thread_counts):
        cpu.use_simd(level)
        outputs = run(threads)
        for output in outputs:
            assert np.isfinite(output).all(), f"not written: {level}, {threads} threads"
        first = first or outputs
        for output, expected in zip(outputs, first, strict=True):
            assert np.array_equal(output, expected), f"differs: {level}, {threads} threads"


def check_words(cpu, count):
    def run(threads):
        counter, key = (random_words(count * n) for n in (4, 2))
        out = empty(4 * count, dtype=np.int64)
        cpu.philox_words(at(counter), at(key), at(out), count, threads)
        return [out]

    def random_words(n):
        return filled(np.random.default_rng(1).integers(0, 2**32, n))

    same_on_every_path(cpu, run, (1, 2, 3, 4))


def check_fill(cpu, samples, elements, offset, threads=(1,)):
    for is_normal in (False, True):

        def run(threads, is_normal=is_normal):
            out = empty(samples * elements, offset)
            seed, step, first = 2**64 - 1, 2**32 - 1, 2**32 - 2
            cpu.philox_fill(is_normal, at(out), samples, elements, seed, 3, step, first, threads)
            return [out]

        same_on_every_path(cpu, run, threads)


def check_box_muller(cpu, pairs, offset):
    words = filled(random.integers(0, 2**32, 2 * pairs).astype(np.uint32), offset)

    def run(_threads):
        out = empty(2 * pairs, offset)
        cpu.box_muller(at(words), at(out), pairs)
        return [out]

    same_on_every_path(cpu, run)


def check_dropout(cpu, samples, elements, offset, threads=(1,)):
    for dtype, in_place in itertools.product(("float32", "float64"), (False, True)):
        x = normal(samples * elements, offset, dtype)

        def run(threads, x=x, in_place=in_place, dtype=dtype):
            x = filled(x, offset)
            out = x if in_place else empty(x.size, offset, dtype)
            cpu.dropout(
                at(x), at(out), DTYPE_CODES[dtype], samples, elements, 7, 20000, 1.5, 5, 6, 7,
                threads,
            )  # fmt: skip
            return [out]

        same_on_every_path(cpu, run, threads)


def check_q_sample(cpu, shape, samples, offset, prediction, dtype, given, flip, threads=(1,)):
    """given: rows, t and noise are given instead of counted and drawn."""
    channels, height, width = shape
    elements, images = channels * height * width, samples + 1 if given else samples
    pixels = random.integers(0, 256, images * elements).astype(np.uint8)
    x_0 = filled(pixels, offset) if dtype == "uint8" else normal(images * elements, offset)
    rows = filled(np.arange(samples, 0, -1)) if given else None  # the last image first
    t = filled(np.arange(samples) % NUM_TIMESTEPS) if given else None
    noise = normal(samples * elements, offset) if given else None
    abar, (counted, held) = table(), counters(on_device=given)

    def run(threads):
        x_t, target = (empty(samples * elements, offset) for _ in range(2))
        t_out = None if given else empty(samples, dtype=np.int64)
        cpu.q_sample(
            samples=samples, channels=channels, height=height, width=width,
            x_0=at(x_0), x_0_dtype=DTYPE_CODES[dtype], rows=at(rows), alphas_cumprod=at(abar),
            num_timesteps=NUM_TIMESTEPS, t=at(t), t_out=at(t_out), noise=at(noise), **counted,
            flip=flip, prediction=prediction, x_t=at(x_t), x_t_dtype=0, target=at(target),
            target_dtype=0, channels_last=False, threads=threads,
        )  # fmt: skip
        if t_out is not None:
            assert ((t_out >= 0) & (t_out < NUM_TIMESTEPS)).all()
        return [x_t, target]

    same_on_every_path(cpu, run, threads)
    del held  # until here its addresses were in use


def check_posterior_step(
    cpu, elements, samples, offset, prediction, variance, eta, clip, guided, given, in_place=False,
    threads=(1,),
):  # fmt: skip
    """clip: None, "unit" or "dynamic"; given: t for each sample, and noise."""
    channels = 1 if elements % 3 else 3
    outputs = channels * (2 if variance in (LEARNED, LEARNED_RANGE) else 1)
    positions = elements // channels
    x_t = normal(samples * elements, offset)
    output = normal(samples * outputs * positions, offset)
    unconditional = normal(output.size, offset) if guided else None
    noise = normal(x_t.size, offset) if given else None
    t = filled(np.arange(samples) % NUM_TIMESTEPS) if given else None
    t_prev = filled(t - 1) if given else None
    abar, (counted, held) = table(), counters(on_device=given)

    def run(threads):
        x = filled(x_t, offset)
        x_prev = x if in_place else empty(x.size, offset)
        x_0 = empty(x.size, offset)
        cpu.posterior_step(
            samples=samples, channels=channels, positions=positions, x_t=at(x), output=at(output),
            output_dtype=0, output_channels=outputs, unconditional=at(unconditional),
            guidance=1.5, alphas_cumprod=at(abar), num_timesteps=NUM_TIMESTEPS,
            t=5, t_at=at(t), t_stride=1, t_prev=3, t_prev_at=at(t_prev), t_prev_stride=1,
            prediction=prediction, variance=variance, eta=eta, recompute_eps=bool(given),
            clip=clip is not None, quantile=0.9 if clip == "dynamic" else -1.0, noise=at(noise),
            **counted, x_prev=at(x_prev), x_0=at(x_0), copy=0, copy_dtype=0, channels_last=False,
            threads=threads,
        )  # fmt: skip
        return [x_prev, x_0]

    same_on_every_path(cpu, run, threads)
    del held


def check_small_sizes(cpu):
    for elements, offset in itertools.product(SIZES, (0, 1)):
        samples = 1 if elements > 1000 else 3
        check_words(cpu, elements)
        check_fill(cpu, samples, elements, offset)
        check_box_muller(cpu, elements, offset)
        check_dropout(cpu, samples, elements, offset)
        choices = itertools.product(PREDICTIONS, ("float32", "uint8"), (False, True), (False, True))
        for choice in choices:
            check_q_sample(cpu, (1, 1, elements), samples, offset, *choice)
    for shape in ((3, 5, 7), (3, 1, 1), (2, 9, 129), (1, 4097, 1), (3, 32, 32)):
        for dtype, given in itertools.product(("float32", "uint8"), (False, True)):
            check_q_sample(cpu, shape, 5, 1, V, dtype, given, flip=True)


def check_small_steps(cpu):
    variances = (FIXED_LARGE, FIXED_SMALL, LEARNED, LEARNED_RANGE)
    rules = itertools.product(variances, (-1.0, 0.0, 0.5), (None, "unit", "dynamic"))
    choices = list(itertools.product(rules, (False, True), (False, True)))
    for elements, offset in itertools.product(SIZES, (0, 1)):
        samples = 1 if elements > 1000 else 3
        for i, (rule, guided, given) in enumerate(choices):
            prediction, in_place = i % 3, i % 2 == 0
            check_posterior_step(
                cpu, elements, samples, offset, prediction, *rule, guided, given, in_place
            )


def check_threads(cpu):
    """Work for four threads: 65536 elements each, in samples that do not divide evenly."""
    threads, samples, elements = (1, 2, 3, 4), 65, 4097
    check_fill(cpu, samples, elements, 1, threads)
    check_dropout(cpu, samples, elements, 1, threads)
    for dtype, given in itertools.product(("float32", "uint8"), (False, True)):
        check_q_sample(cpu, (1, 17, 241), samples, 1, V, dtype, given, True, threads)
    for clip, given in itertools.product(("unit", "dynamic"), (False, True)):
        check_posterior_step(
            cpu, elements, samples, 1, EPS, LEARNED_RANGE, -1.0, clip, True, given, True, threads
        )


def check_nothing_to_do(cpu):
    """No samples, and no elements, which ops refuses for q_sample and posterior_step."""
    for samples, elements in ((0, 4), (4, 0), (0, 0)):
        check_fill(cpu, samples, elements, 0)
        check_dropout(cpu, samples, elements, 0)
    check_q_sample(cpu, (1, 1, 4), 0, 0, EPS, "float32", False, True)
    for clip in (None, "dynamic"):
        check_posterior_step(cpu, 4, 0, 0, V, FIXED_LARGE, -1.0, clip, True, True)


def check_values_that_are_not_numbers(cpu):
    """Conversions of NaN and infinity must be defined, and sorting them must end."""
    bad = np.array([np.nan, np.inf, -np.inf, 1e38, -np.nan] * 7, np.float32)
    abar, (counted, held) = table(), counters(on_device=False)
    for clip, level in itertools.product((False, True), cpu.simd_levels()):
        cpu.use_simd(level)
        x_t, output = filled(bad), filled(np.concatenate([bad[::-1], bad]))
        x_prev, x_0 = empty(bad.size), empty(bad.size)
        cpu.posterior_step(
            samples=1, channels=1, positions=bad.size, x_t=at(x_t), output=at(output),
            output_dtype=0, output_channels=2, unconditional=0, guidance=1.0,
            alphas_cumprod=at(abar), num_timesteps=NUM_TIMESTEPS, t=5, t_at=0, t_stride=0,
            t_prev=4, t_prev_at=0, t_prev_stride=0, prediction=EPS, variance=LEARNED_RANGE,
            eta=-1.0, recompute_eps=False, clip=clip, quantile=0.5, noise=0, **counted,
            x_prev=at(x_prev), x_0=at(x_0), copy=0, copy_dtype=0, channels_last=False, threads=1,
        )  # fmt: skip
    del held


def main(path, *flags):
    cpu = load(path).cpu
    if flags == ("overrun",):  # what the sanitizer must catch
        out = empty(512)
        cpu.philox_fill(True, at(out), 1, 513, 0, 0, 0, 0, 1)
        return
    for check in (
        check_small_sizes, check_small_steps, check_threads, check_nothing_to_do,
        check_values_that_are_not_numbers,
    ):  # fmt: skip
        check(cpu)
    cpu.use_simd(cpu.simd_levels()[-1])
    print("all checks passed:", *cpu.simd_levels())


if __name__ == "__main__":
    main(*sys.argv[1:])
