"""Names in state dicts that wrappers have lengthened."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# DDP and AveragedModel; torch.compile; trainers that keep a net beside its average, which is
# taken where both are there.
PREFIXES = ("module.", "_orig_mod.", "ema_model.", "model.", "ema.", "net.")


def strip_prefix(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The weights under a net's own names, and what stood before those: "" or "module.", ...

    Entries outside any module (a counter, a schedule) and those of another prefix are left out
    where there is a prefix, which may be several in a row.
    """
    weights, found = dict(state), ""
    while prefix := _prefix(weights):
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        found += prefix
    return weights, found


def _prefix(state: Mapping[str, Tensor]) -> str | None:
    inside = [name for name in state if "." in name]
    if not all(name.startswith(PREFIXES) for name in inside):
        return None
    return next((p for p in PREFIXES if any(name.startswith(p) for name in inside)), None)
