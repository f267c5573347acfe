"""Prefixes that wrappers put before the names of a state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

WRAPPERS = ("module.", "_orig_mod.")  # of DDP and AveragedModel; of torch.compile
# Of trainers that keep a net beside its average, which is taken where both are there
AVERAGED_PREFIXES, TRAINED_PREFIXES = ("ema_model.", "ema."), ("model.", "net.")
PREFIXES = WRAPPERS + AVERAGED_PREFIXES + TRAINED_PREFIXES


def strip_prefix(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The weights under a net's own names, and what stood before those: "" or "module.", ...

    Entries outside any module (a counter, a schedule) and those of another prefix are left out
    where there is a prefix, which may be several in a row.
    """
    weights, found = dict(state), ""
    while all(name.startswith(PREFIXES) for name in weights if "." in name):
        weights, prefix = under(weights, PREFIXES)
        if not prefix:
            break
        found += prefix
    return weights, found


def under(state: Mapping[str, Tensor], prefixes: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """What stands under the first prefix that a name has, without it, and that; or all, and ""."""
    for prefix in prefixes:
        if found := {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}:
            return found, prefix
    return dict(state), ""


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names without what WRAPPERS add, wherever it stands: no part of our nets is called so."""
    parts = {wrapper.rstrip(".") for wrapper in WRAPPERS}
    return {".".join(p for p in name.split(".") if p not in parts): state[name] for name in state}
