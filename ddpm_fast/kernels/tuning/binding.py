"""Record the kernels that launch code binds, as on a GPU, without running them.

For a process of its own: after `record`, no launch of that process runs. Tensors may be on the meta
device, where large ones cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddpm_fast.kernels.spec import Launch
from ddpm_fast.kernels.tuning.offline import misfits, options_of, source_of


@dataclass(frozen=True)
class Bound:
    """A kernel as Triton would compile it for a launch.

    source   kernel, types of its arguments, what is known of their values, constants
    options  num_warps, num_stages and the like, as Triton fills them up
    """

    source: Any
    options: Any
    arch: int

    @property
    def name(self) -> str:
        values = [f"{self.source.fn.arg_names[i]}={v}" for (i,), v in self.source.constants.items()]
        types = [kind for kind in self.source.signature.values() if kind.startswith("*")]
        warps = f"num_warps={self.options.num_warps}"
        return f"{self.source.fn.__name__} {types[0]} {' '.join(values)} {warps}"

    def misfits(self) -> list[str]:
        """Compiled, why it does not fit the chip; empty if it does."""
        return misfits(self.source, vars(self.options), self.arch)


class _Driver:
    """A stand-in for the CUDA driver, up to compilation."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record(arch: int) -> dict[str, Bound]:
    """Bind this process's launches for `arch` from now on; the dict fills up, by Triton's key."""
    from triton.compiler import ASTSource
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found: dict[str, Bound] = {}

    def keep(kernel, _, signature, _device, constexprs, options, attrs, _warmup) -> None:
        known = {at: facts for at, facts in attrs.items() if facts}
        source = ASTSource(kernel, signature, constexprs, known)
        found.setdefault(_key(source, options), Bound(source, options, arch))

    driver.set_active(_Driver(arch))
    JITFunction._do_compile = keep  # which returns no kernel: nothing is launched
    return found


def key_of(launch: Launch, arch: int) -> str:
    """Of a launch as offline.py compiles it; in `record`'s dict if launch code binds the same."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    options = make_backend(GPUTarget("cuda", arch, 32)).parse_options(options_of(launch))
    return _key(source_of(launch), options)


def _key(source: Any, options: Any) -> str:
    return f"{source.hash()}-{options.hash()}"
