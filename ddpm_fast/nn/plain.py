"""Which submodules may be read instead of called."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether computing from `module`'s weights gives all that calling it would.

    kind  the class that it was made as
    False where it was replaced (LoRA, quantisation), parametrised, pruned, hooked (globally too),
    patched or compiled on its own, or holds weights of another tensor class: then call it
    """
    if type(module) is not kind or "forward" in module.__dict__ or module._compiled_call_impl:
        return False
    if _has_any_global_hook() or any(getattr(module, name) for name in _HOOKS):
        return False
    return not any(is_traceable_wrapper_subclass(w) for w in module._parameters.values())


def is_plain_conv(module: nn.Module, kernel_size: int) -> bool:
    """Whether it is_plain and a convolution of stride 1 that keeps height and width."""
    if not is_plain(module, nn.Conv2d):
        return False
    settings = (module.kernel_size, module.padding, module.stride, module.dilation)
    kept = ((kernel_size,) * 2, (kernel_size // 2,) * 2, (1, 1), (1, 1))
    return settings == kept and module.groups == 1 and module.padding_mode == "zeros"
