"""ema = decay * ema + (1 - decay) * weight, in fp32, at addresses that never change."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from ddpm_fast.kernels.calling.arguments import given


@torch.no_grad()
def move_averages(averages: list[Tensor], weights: list[Tensor], share: Tensor) -> None:
    """average += share * (weight - average); on a GPU in one launch, which may be captured.

    averages, weights  fp32, each pair of one shape and layout in memory
    share   () fp32 on their device, read there; 0 leaves the averages as they are, whatever the
            weights hold
    raises  ValueError  a pair of other layouts, whose elements would not meet
    """
    for average, weight in zip(averages, weights, strict=True):
        if average.stride() != weight.stride():
            raise ValueError(
                f"an average has strides {average.stride()}, its weight {weight.stride()}: must be "
                "the same; make the EMA of the net in its final memory format"
            )
    if not share.is_cpu:
        move_in_one_launch(averages, weights, share)
    elif share != 0:  # half the time of the fused kernel's there
        torch._foreach_lerp_(averages, weights, share.item())


def move_in_one_launch(averages: list[Tensor], weights: list[Tensor], share: Tensor) -> None:
    """By torch's fused SGD: a step of ascent along the weights, with weight decay 1."""
    sgd(
        averages, weights, [None] * len(averages), fused=True, lr=share, weight_decay=1.0,
        maximize=True, momentum=0.0, dampening=0.0, nesterov=False, found_inf=(share == 0).float(),
    )  # fmt: skip


class EMA:
    """Exponential moving average of a net's weights, kept in a frozen copy of the net.

    net      the net to follow; its running averages (batch norm) are copied, not averaged
    decay    in [0, 1): share kept at each update
    warmup   decay for update k (from 1) is min(decay, (1 + k) / (10 + k)), so that the first
             averages are not mostly the initial weights
    raises   ValueError  no module, or a decay outside [0, 1)

    `ema.net` is the averaged net: fp32, eval mode, no gradients. Sample from it as it is.
    """

    def __init__(self, net: nn.Module, decay: float = 0.9999, *, warmup: bool = False) -> None:
        if not isinstance(net, nn.Module):
            raise ValueError(f"{given('net', net)} must be a module")
        decay = float(decay)  # also one of NumPy's or torch's
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be in [0, 1)")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.net = copy.deepcopy(net).float().eval().requires_grad_(False)
        self._average = list(self.net.parameters())
        state = self.net.state_dict()
        self._copied = {name: b for name, b in self.net.named_buffers() if name in state}

    def decay_at(self, update: int) -> float:
        """The decay of the update-th update, counted from 1."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @property
    def next_weight(self) -> float:
        """The share of the new weights in the next update."""
        return 1 - self.decay_at(self.updates + 1)

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move the averages towards `net`'s weights, and count that."""
        weights = [w.float() for w in net.parameters()]
        torch._foreach_lerp_(self._average, weights, self.next_weight)
        self.count_update(net)

    def move(self, net: nn.Module, share: Tensor) -> None:
        """move_averages towards `net`'s weights, not counted."""
        move_averages(self._average, list(net.parameters()), share)

    @torch.no_grad()
    def count_update(self, net: nn.Module) -> None:
        """All of an update but the averages, for who moves them elsewhere.

        Batch norm's running statistics are taken over, not averaged.
        """
        self.updates += 1
        theirs = dict(net.named_buffers())
        if missing := self._copied.keys() - theirs.keys():
            raise ValueError(f"net lacks the buffers {sorted(missing)} of the averaged one")
        for name, mine in self._copied.items():
            mine.copy_(theirs[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the net's own names."""
        return self.net.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], *, updates: int) -> None:
        """Continue from saved averages and the number of updates behind them."""
        self.net.load_state_dict(state)
        self.updates = updates
