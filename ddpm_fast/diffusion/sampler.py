"""From noise to images: ancestral and DDIM sampling over any f(x, t, y) that predicts noise.

Image i is a function of (seed, i): its start and its noise come from counters, so batches may be
cut anywhere. Batches are padded to `batch_size`, because a convolution may choose another
algorithm, and so other roundings, at another size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ddpm_fast import ops
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.diffusion.schedule import sampling_timesteps
from ddpm_fast.errors import nearest
from ddpm_fast.graphs import CapturedCall
from ddpm_fast.kernels.philox import Stream
from ddpm_fast.kernels.philox_counters import check_counters

SAMPLERS = ("ddim", "ddpm")
FIXED_VARIANCES = ("fixed_large", "fixed_small")  # the net predicts eps alone
DDIM_STEPS = 50

# (timestep, x_prev, x_0), after each step; the tensors are (batch_size, C, H, W)
OnStep = Callable[[int, Tensor, Tensor], None]


def sample_images(
    net: Callable[..., Tensor],
    proc: Diffusion,
    num_images: int,
    *,
    sampler: str = "ddim",
    steps: int | None = None,
    eta: float = 0.0,
    spacing: str = "leading",
    variance: str = "fixed_large",
    clip: bool = True,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    batch_size: int = 64,
    y: Tensor | None = None,
    guidance: float = 1.0,
    null_class: int | None = None,
    recompute_eps: bool = True,
    seed: int = 0,
    first_index: int = 0,
    x_T: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw images.

    net           a U-Net, or any f(x, t, y) -> eps; a module is run in eval mode
    num_images    N >= 0
    sampler       "ddim" or "ddpm" (ancestral);  steps  None: 50 for ddim, T for ddpm
    eta           DDIM's share of noise, 0 = deterministic
    spacing       "leading", "linspace", "trailing" or "quadratic"
    variance      "fixed_large" or "fixed_small", for ddpm
    clip          clamp each x_0 estimate to [-1, 1];  recompute_eps  see ops.posterior_step
    image_size    pixels; None: the net's own;  channels  None: the net's own
    y             (N,) int64 classes, for a net that has them
    guidance      classifier-free: eps = u + guidance (eps(x, t, y) - u), u = eps(x, t, null_class),
                  the class that the net was trained to take for none; 1: eps(x, t, y) alone
    seed          with first_index + i it names image i, whatever the batches
    x_T           (N, C, H, W) to start from instead of counted noise
    device        None: that of the net's parameters, else of x_T, else the CPU
    dtype         that the net is run in, such as torch.bfloat16; None: the net's own
    on_step       called after each step of each batch
    returns       (N, C, H, W) fp32, clamped to [-1, 1] when clip
    raises        ValueError naming the value and what is allowed
    source        Ho et al. 2020, algorithm 2; Song et al. 2020, eq. 12; Ho & Salimans 2022, eq. 6

    Called again and again for one net, a :class:`Sampler` saves the preparation.
    """
    draw = Sampler(
        net, proc, sampler=sampler, steps=steps, eta=eta, spacing=spacing, variance=variance,
        clip=clip, batch_size=batch_size, guidance=guidance, null_class=null_class,
        recompute_eps=recompute_eps, shape=_image_shape(net, x_T, image_size, channels),
        device=_device(net, x_T, device), dtype=dtype,
    )  # fmt: skip
    return draw(num_images, y=y, seed=seed, first_index=first_index, x_T=x_T, on_step=on_step)


class Sampler:
    """Draws batches of images through buffers that keep their addresses.

    On CUDA a step (the net and the update) is captured once and replayed for all steps of all
    batches; the timesteps and their number lie on the device, and nothing waits for it.

    shape   (C, H, W); None: the net's own.  The other arguments are those of sample_images
    raises  ValueError naming the value and what is allowed
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        proc: Diffusion,
        *,
        sampler: str = "ddim",
        steps: int | None = None,
        eta: float = 0.0,
        spacing: str = "leading",
        variance: str = "fixed_large",
        clip: bool = True,
        batch_size: int = 64,
        guidance: float = 1.0,
        null_class: int | None = None,
        recompute_eps: bool = True,
        shape: tuple[int, int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if not math.isfinite(guidance):
            raise ValueError(f"guidance={guidance} must be finite")
        if (guidance != 1) != (null_class is not None):
            raise ValueError(
                f"guidance={guidance} with null_class={null_class}: a guidance other than 1 needs "
                "the class that stands for none, and only it does"
            )
        self.times = _timesteps(proc, sampler, steps, spacing, variance, eta)
        self.net, self.batch_size, self.clip = _in_dtype(net, dtype), batch_size, clip
        self.shape = _image_shape(net, None, None, None) if shape is None else shape
        self.device = device = _device(net, None, device)
        self._update = {
            "eta": eta if sampler == "ddim" else None, "variance": variance, "clip": clip,
            "recompute_eps": recompute_eps, "guidance": guidance,
        }  # fmt: skip
        self._table = proc.table(device)
        self._visited = torch.tensor([*self.times, -1], device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # in self._visited
        self._seed, self._first_index = torch.zeros(2, dtype=torch.int64, device=device).unbind()
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self._x, self._x_0 = (
            torch.empty(batch_size, *self.shape, device=device).to(memory_format=layout)
            for _ in range(2)
        )
        self._dtype = dtype or torch.float32
        self._input = self._x if dtype is None else self._x.to(dtype)  # what the net sees
        self._y = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._null = None if null_class is None else torch.full_like(self._y, null_class)
        self._steps = {
            has_classes: CapturedCall(step, device)
            for has_classes, step in ((False, self._step), (True, self._step_of_classes))
        }

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
        """Draw num_images; arguments and result as sample_images'."""
        if num_images < 0:
            raise ValueError(f"num_images={num_images} must not be negative")
        for name, given in (("y", y), ("x_T", x_T)):
            if given is not None and given.shape[0] != num_images:
                raise ValueError(
                    f"{name} has {given.shape[0]} rows, must be num_images={num_images}"
                )
        if self._null is not None and y is None:
            raise ValueError("guidance is between classes and none: give y, (N,) int64")
        check_counters(
            seed=seed, stream=Stream.SAMPLER_START, step=0, first_index=first_index,
            samples=num_images, elements=math.prod(self.shape),
        )  # fmt: skip
        images = torch.empty((num_images, *self.shape), device=self.device)
        with torch.inference_mode(), _eval_mode(self.net), _held_weights(self.net):
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
                images[rows] = self._x[ahead : ahead + images[rows].shape[0]]
        return images.clamp(-1, 1) if self.clip else images

    @property
    def why_no_graph(self) -> str | None:
        """Why a step is launched anew each time; None: it is one graph, or was not called yet."""
        return self._steps[False].why_not or self._steps[True].why_not

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

    def _denoise(self, has_classes: bool, on_step: OnStep | None) -> None:
        step = self._steps[has_classes]
        for t in self.times:
            step()
            if on_step is not None:
                on_step(t, self._x.clone(), self._x_0.clone())

    def _step_of_classes(self) -> None:
        self._step(self._y)

    def _step(self, *y: Tensor) -> None:
        """One step of the batch as a function of the buffers."""
        t, t_prev = self._visited[self._at], self._visited[self._at + 1]  # (1,)
        times = t.expand(self.batch_size).contiguous()
        eps = self._predicted(times, *y)
        u = None if self._null is None else self._predicted(times, self._null)
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
        eps = self.net(self._input, times, *y)
        given = eps.untyped_storage().data_ptr() == self._x.untyped_storage().data_ptr()
        return eps.clone() if given else eps  # a net that returns what it was given


def _timesteps(
    proc: Diffusion, sampler: str, steps: int | None, spacing: str, variance: str, eta: float
) -> list[int]:
    """The timesteps visited, most noise first."""
    if sampler not in SAMPLERS:
        raise ValueError(
            f"sampler={sampler!r}{nearest(sampler, SAMPLERS)} must be one of {', '.join(SAMPLERS)}"
        )
    if variance not in FIXED_VARIANCES:
        raise ValueError(f"variance={variance!r} must be one of {', '.join(FIXED_VARIANCES)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be from 0 to 1")
    if steps is None:
        steps = min(DDIM_STEPS, proc.num_timesteps) if sampler == "ddim" else proc.num_timesteps
    return sampling_timesteps(proc.num_timesteps, steps, spacing)


def _in_dtype(net: Callable[..., Tensor], dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """The net itself, or a copy of a module in another dtype."""
    if dtype is None or not isinstance(net, nn.Module):
        return net
    return copy.deepcopy(net).to(dtype)


def _device(
    net: Callable[..., Tensor], x_T: Tensor | None, device: torch.device | str | None
) -> torch.device:
    if device is not None:
        return torch.device(device)
    if isinstance(net, nn.Module):
        for parameter in net.parameters():
            return parameter.device
    return torch.device("cpu") if x_T is None else x_T.device


def _image_shape(
    net: Callable[..., Tensor],
    x_T: Tensor | None,
    image_size: int | tuple[int, int] | None,
    channels: int | None,
) -> tuple[int, int, int]:
    """(C, H, W) from x_T, else from what was given, else from the net."""
    if x_T is not None:
        if x_T.ndim != 4:
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}, must be (N, C, H, W)")
        return tuple(x_T.shape[1:])
    size = getattr(net, "image_size", None) if image_size is None else image_size
    channels = getattr(net, "img_channels", None) if channels is None else channels
    if size is None or channels is None:
        raise ValueError("image_size and channels are unknown: give both, or x_T (N, C, H, W)")
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def _pad(rows: Tensor, batch_size: int, ahead: int) -> Tensor:
    """Repeat the first row `ahead` times before it, and the last one until there are batch_size."""
    behind = batch_size - ahead - rows.shape[0]
    if ahead == behind == 0:
        return rows
    size = rows.shape[1:]
    return torch.cat((rows[:1].expand(ahead, *size), rows, rows[-1:].expand(behind, *size)))


@contextmanager
def _eval_mode(net: Callable[..., Tensor]) -> Iterator[None]:
    """No dropout while sampling; each module's mode comes back afterwards."""
    modules = list(net.modules()) if isinstance(net, nn.Module) else []
    modes = [module.training for module in modules]
    if any(modes):
        net.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training


@contextmanager
def _held_weights(net: Callable[..., Tensor]) -> Iterator[None]:
    """What modules make of their weights is made once for all steps (see nn.upsample)."""
    with ExitStack() as stack:
        for module in net.modules() if isinstance(net, nn.Module) else ():
            if hasattr(module, "held_weights"):
                stack.enter_context(module.held_weights())
        yield
