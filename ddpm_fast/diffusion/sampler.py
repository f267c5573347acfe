"""From noise to images: ancestral and DDIM sampling over any f(x, t, y) that predicts noise.

Image i is a function of (seed, i): its start and its noise come from counters, so batches may be
cut anywhere. Batches are padded to `batch_size`, because a convolution may choose another
algorithm, and so other roundings, at another size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.diffusion.arguments import LeftOut, as_float, as_int, positive
from ddpm_fast.diffusion.compiling import CompiledNet, check_compile, pays
from ddpm_fast.diffusion.nets import (
    addresses,
    attribute,
    checked_classes,
    copy_weights,
    eval_mode,
    held_weights,
    image_shape,
    in_dtype,
    own_dtype,
    prediction_of,
    running_device,
    without_autocast_cache,
)
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.diffusion.sampler_checks import (
    count_of,
    guidance_of,
    process_of,
    start_of,
    visited_timesteps,
)
from ddpm_fast.diffusion.schedule import low_start
from ddpm_fast.errors import NotFinite
from ddpm_fast.kernels.calling.autocast import autocast_dtype
from ddpm_fast.kernels.philox.counters import check_counters
from ddpm_fast.kernels.philox.op import Stream
from ddpm_fast.runtime.graphs import CapturedCall

BATCH_SIZE = LeftOut(64)

# (timestep, x_prev, x_0), after each step; the tensors are (batch_size, C, H, W)
OnStep = Callable[[int, Tensor, Tensor], None]


def sample_images(
    net: Callable[..., Tensor],
    proc: Diffusion | None,
    num_images: int,
    *,
    sampler: str = "ddim",
    steps: int | None = None,
    eta: float = 0.0,
    spacing: str = "trailing",
    variance: str = "fixed_large",
    clip: bool = True,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    batch_size: int = BATCH_SIZE,
    y: Tensor | None = None,
    guidance: float = 1.0,
    null_class: int | None = None,
    recompute_eps: bool = True,
    seed: int = 0,
    first_index: int = 0,
    x_T: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compile: str | bool = "auto",
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw images.

    net           a U-Net, or any f(x, t, y) -> eps, or -> an object or dict that holds it as
                  `sample`; a module is run in eval mode
    proc          None: the one that the net was trained with (df.load's net.process)
    num_images    N >= 0
    sampler       "ddim" or "ddpm" (ancestral);  steps  None: 50 for ddim, T for ddpm
    eta           DDIM's share of noise, 0 = deterministic
    spacing       "trailing" (from T - 1 down), "leading", "linspace" or "quadratic"
    variance      "fixed_large" or "fixed_small", for ddpm
    clip          clamp each x_0 estimate to [-1, 1];  recompute_eps  DDIM's, see ops.posterior_step
    image_size    pixels, one number or (H, W); None: the net's own;  channels  None: the net's own
    batch_size    images at a time; the last batch is padded to it, so an image has the same bits
                  for one batch_size, and 1e-4 of them change for another. Left out: 64, or
                  num_images if that is less
    y             (N,) int64 classes, for a net that has them
    guidance      classifier-free: eps = u + guidance (eps(x, t, y) - u), u = eps(x, t, null_class),
                  the class that the net was trained to take for none; 1: eps(x, t, y) alone
    seed          with first_index + i it names image i, whatever the batches
    x_T           (N, C, H, W) to start from instead of counted noise
    device        None: that of the net's parameters, else of x_T, else the CPU
    dtype         that the net is run in, such as torch.bfloat16; None: the net's own
    compile       "auto": by torch.compile on CUDA, where the images are enough to repay it; "on",
                  "off" (or True, False). Where it fails, a warning says so and the net runs as it
                  is
    on_step       called after each step of each batch
    returns       (N, C, H, W) fp32, fp64 of a net in it; clamped to [-1, 1] when clip
    raises        ValueError naming the value and what is allowed
                  NotFinite  the net's output was infinite or NaN: its step and the images
    warns         of a proc that is not the net's own; of timesteps that begin below 0.9 T
    source        Ho et al. 2020, algorithm 2; Song et al. 2020, eq. 12; Ho & Salimans 2022, eq. 6

    Called again and again for one net, a :class:`Sampler` saves the preparation.
    """
    num_images = count_of(num_images)
    if batch_size is BATCH_SIZE:
        batch_size = max(1, min(BATCH_SIZE, num_images))
    x_T = start_of(x_T)
    draw = Sampler(
        net, proc, sampler=sampler, steps=steps, eta=eta, spacing=spacing, variance=variance,
        clip=clip, batch_size=batch_size, guidance=guidance, null_class=null_class,
        recompute_eps=recompute_eps, shape=image_shape(net, x_T, image_size, channels),
        device=running_device(net, x_T, device), dtype=dtype, compile=compile,
    )  # fmt: skip
    images = draw(num_images, y=y, seed=seed, first_index=first_index, x_T=x_T, on_step=on_step)
    draw.check_finite()
    return images


class Sampler:
    """Draws batches of images through buffers that keep their addresses.

    On CUDA a step (the net and the update) is captured once and replayed for all steps of all
    batches; the timesteps and their number lie on the device, and nothing waits for it: see
    `check_finite`. What changes in the net's weights between two calls counts in the second, also
    for a net that is run in another dtype.

    shape   (C, H, W); None: the net's own.  The other arguments are those of sample_images, but
            batch_size, which is 64 for any number of images
    compile "auto" goes by the images of one call
    raises  ValueError naming the value and what is allowed
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        proc: Diffusion | None = None,
        *,
        sampler: str = "ddim",
        steps: int | None = None,
        eta: float = 0.0,
        spacing: str = "trailing",
        variance: str = "fixed_large",
        clip: bool = True,
        batch_size: int = 64,
        guidance: float = 1.0,
        null_class: int | None = None,
        recompute_eps: bool = True,
        shape: tuple[int, int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compile: str | bool = "auto",
    ) -> None:
        proc = process_of(net, proc)
        self._compile = check_compile(compile)
        self.batch_size, self.clip = positive("batch_size", batch_size), clip
        eta = as_float("eta", eta, "from 0 to 1")
        guidance, null_class = guidance_of(net, guidance, null_class)
        self.times = visited_timesteps(proc, sampler, steps, spacing, variance, eta, recompute_eps)
        self._low_start = low_start(proc.num_timesteps, self.times, spacing)
        if shape is None:
            self.shape = image_shape(net, None, None, None)
        else:
            self.shape = tuple(positive("shape entry", size) for size in shape)
            if len(self.shape) != 3:
                raise ValueError(f"shape={self.shape} must be (C, H, W)")
        self.device = running_device(net, None, device)
        self._dtype = dtype or own_dtype(net) or torch.float32
        self._table = proc.table(self.device)
        self._source = net
        with torch.inference_mode(False):  # or they could not be written to outside of it
            self.net = in_dtype(net, dtype)
            self._make_buffers(null_class)
        self._forward: Callable[..., Tensor] = self.net
        self._update = {
            "eta": eta if sampler == "ddim" else None, "variance": variance, "clip": clip,
            "recompute_eps": recompute_eps, "guidance": guidance,
        }  # fmt: skip
        self._capture_anew()

    def _make_buffers(self, null_class: int | None) -> None:
        device, size = self.device, self.batch_size
        self._visited = torch.tensor([*self.times, -1], device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # in self._visited
        self._seed, self._first_index = torch.zeros(2, dtype=torch.int64, device=device).unbind()
        exact = torch.float64 if self._dtype == torch.float64 else torch.float32
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self._x, self._x_0 = (
            torch.empty(size, *self.shape, dtype=exact, device=device).to(memory_format=layout)
            for _ in range(2)
        )
        self._input = self._x.to(self._dtype)  # what the net sees
        self._y = torch.zeros(size, dtype=torch.int64, device=device)
        self._null = None if null_class is None else torch.full_like(self._y, null_class)
        # Of each image, of the batch and of the last call: the timestep at which a value was first
        # not finite, or -1.
        self._failed = torch.full_like(self._y, -1)
        self._all_failed, self._first = self._failed[:0], 0

    def __call__(
        self,
        num_images: int,
        *,
        y: Tensor | None = None,
        seed: int = 0,
        first_index: int = 0,
        x_T: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draw num_images; arguments and result as sample_images', but for `check_finite`."""
        num_images = count_of(num_images)
        seed = as_int("seed", seed, "an int, 0 <= seed < 2**63")
        first_index = as_int("first_index", first_index, "an int, 0 <= first_index < 2**32")
        y, x_T = self._classes(y, num_images), self._starts(x_T, num_images)
        check_counters(
            seed=seed, stream=Stream.SAMPLER_START, step=0, first_index=first_index,
            samples=num_images, elements=math.prod(self.shape),
        )  # fmt: skip
        if x_T is None and self._low_start is not None:
            warnings.warn(self._low_start, stacklevel=2)
        # No inference tensors: a net that guides itself differentiates its input.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            eval_mode(self.net),
            without_autocast_cache(self.device),
        ):
            self._follow_net(num_images)
            with held_weights(self.net) as held:
                self._follow_addresses(held)
                images = self._draw(num_images, y, seed, first_index, x_T, on_step)
            return images.clamp(-1, 1) if self.clip else images

    def _draw(
        self,
        num_images: int,
        y: Tensor | None,
        seed: int,
        first_index: int,
        x_T: Tensor | None,
        on_step: OnStep | None,
    ) -> Tensor:
        """Batch by batch; (N, C, H, W), not clamped."""
        images = self._x.new_empty((num_images, *self.shape))
        self._all_failed = failed = self._failed.new_full((num_images,), -1)
        self._first = first_index
        self._seed.fill_(seed)
        for start in range(0, num_images, self.batch_size):
            rows = slice(start, start + self.batch_size)
            # No image has a number from 2^32 on: the last batch is padded in front, too.
            ahead = max(0, first_index + start + self.batch_size - 2**32)
            number = first_index + start - ahead
            self._start(None if x_T is None else x_T[rows], seed, number, ahead)
            if y is not None:
                self._y.copy_(_pad(y[rows].to(self.device), self.batch_size, ahead))
            self._denoise(y is not None, on_step)
            drawn = slice(ahead, ahead + images[rows].shape[0])
            images[rows] = self._x[drawn]
            failed[rows] = self._failed[drawn]
        return images

    def check_finite(self) -> None:
        """Raise NotFinite where the net's output was infinite or NaN in the last call.

        It names the first such timestep and the images. Waits for the device.
        """
        at = self._all_failed.cpu()
        if not (bad := (at >= 0).nonzero().flatten()).numel():
            return
        numbers = (bad + self._first).tolist()
        named = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        images = f"image {named}" if len(numbers) == 1 else f"{len(numbers)} images: {named}"
        raise NotFinite(
            f"the net's output is not finite (infinite or NaN) at timestep {int(at.max())} for "
            f"{images}"
        )

    @property
    def why_no_graph(self) -> str | None:
        """Why a step is launched anew each time; None: it is one graph, or was not called yet."""
        return self._steps[False].why_not or self._steps[True].why_not

    @property
    def compiled(self) -> bool:
        """Whether the net runs by torch.compile, as far as it was called."""
        return isinstance(self._forward, CompiledNet) and self._forward.why_not is None

    def _capture_anew(self) -> None:
        """Forget the graphs: the next calls warm up, and capture what is there then."""
        self._steps = {
            has_classes: CapturedCall(step, self.device)
            for has_classes, step in ((False, self._step), (True, self._step_of_classes))
        }
        self._captured_from: tuple | None = None

    def _follow_net(self, num_images: int) -> None:
        """Compile where `num_images` repay it; take over weights that changed since the last
        call."""
        pixels = num_images * len(self.times) * math.prod(self.shape[1:])
        if self._forward is self.net and pays(self._compile, self.device, pixels):
            self._forward = CompiledNet(self.net)
            self._capture_anew()
        if self.net is not self._source:
            copy_weights(self._source, self.net)

    def _follow_addresses(self, held: list[Tensor]) -> None:
        """Other graphs where what they read lies elsewhere now, or autocast is another."""
        reads = (addresses(self.net, held, self.device), autocast_dtype(self.device.type))
        if self._captured_from not in (None, reads):  # None: nothing is captured yet
            self._capture_anew()
        self._captured_from = reads

    def _classes(self, y: Tensor | None, num_images: int) -> Tensor | None:
        """(N,) int64, or None; ValueError for what the net cannot take."""
        if self._null is not None and y is None:
            raise ValueError("guidance is between classes and none: give y, (N,) int64")
        y = checked_classes(self._source, y)
        if y is None:
            return None
        if len(y) != num_images:
            raise ValueError(f"y has {len(y)} rows, must be num_images={num_images}")
        classes = attribute(self._source, "num_classes")
        if classes is not None and y.device.type == "cpu" and num_images:
            for label in (int(y.min()), int(y.max())):
                if not 0 <= label < classes:
                    raise ValueError(f"y holds class {label}, must be from 0 to {classes - 1}")
        return y

    def _starts(self, x_T: Tensor | None, num_images: int) -> Tensor | None:
        """x_T; ValueError for another shape than the images'."""
        x_T = start_of(x_T)
        if x_T is None:
            return None
        if len(x_T) != num_images:
            raise ValueError(f"x_T has {len(x_T)} rows, must be num_images={num_images}")
        if tuple(x_T.shape[1:]) != self.shape:
            wanted = (num_images, *self.shape)
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}, must be {wanted}")
        return x_T

    def _start(self, x_T: Tensor | None, seed: int, first_index: int, ahead: int) -> None:
        """Fill the buffers for the batch that begins with image `first_index`; x_T's are `ahead`
        later."""
        if x_T is None:
            start = ops.philox_normal(
                tuple(self._x.shape), seed=seed, stream=Stream.SAMPLER_START,
                first_index=first_index, device=self.device,
            )  # fmt: skip
        else:
            start = _pad(x_T.to(self.device), self.batch_size, ahead)
        self._x.copy_(start)
        self._input.copy_(self._x)
        self._first_index.fill_(first_index)
        self._at.zero_()
        self._failed.fill_(-1)

    def _denoise(self, has_classes: bool, on_step: OnStep | None) -> None:
        step = self._steps[has_classes]
        for t in self.times:
            step()
            if on_step is not None:
                on_step(t, self._x.clone(), self._x_0.clone())
        self._note_failures(self._x, self._visited[-2:-1])  # what the update made of finite outputs

    def _step_of_classes(self) -> None:
        self._step(self._y)

    def _step(self, *y: Tensor) -> None:
        """One step of the batch as a function of the buffers."""
        t, t_prev = self._visited[self._at], self._visited[self._at + 1]  # (1,)
        times = t.expand(self.batch_size).contiguous()
        eps = self._predicted(times, *y)
        u = None if self._null is None else self._predicted(times, self._null)
        for output in (eps,) if u is None else (eps, u):
            self._note_failures(output, t)
        low_precision = self._input is not self._x
        ops.posterior_step(
            self._x, eps, t[0], self._table, t_prev=t_prev[0], unconditional=u, seed=self._seed,
            step=t[0], first_index=self._first_index,
            copy_dtype=self._dtype if low_precision else None,
            out=(self._x, self._x_0, self._input) if low_precision else (self._x, self._x_0),
            **self._update,
        )  # fmt: skip
        self._at += 1

    def _predicted(self, times: Tensor, *y: Tensor) -> Tensor:
        # Detached: a net may ask its own input for a gradient, in place.
        eps = prediction_of(self._forward(self._input.detach(), times, *y)).detach()
        buffers = {b.untyped_storage().data_ptr() for b in (self._x, self._input)}
        given = eps.untyped_storage().data_ptr() in buffers
        return eps.clone() if given else eps  # a net that returns what it was given

    def _note_failures(self, values: Tensor, t: Tensor) -> None:
        """Record the first t at which an image is not finite; a maximum passes NaN on."""
        first = ~values.abs().amax(dim=(1, 2, 3)).isfinite() & (self._failed < 0)
        self._failed.copy_(torch.where(first, t, self._failed))


def _pad(rows: Tensor, batch_size: int, ahead: int) -> Tensor:
    """Repeat the first row `ahead` times before it, and the last one until there are batch_size."""
    behind = batch_size - ahead - rows.shape[0]
    if ahead == behind == 0:
        return rows
    size = rows.shape[1:]
    return torch.cat((rows[:1].expand(ahead, *size), rows, rows[-1:].expand(behind, *size)))
