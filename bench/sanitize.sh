#!/usr/bin/env bash
# Out-of-bounds accesses, races and uninitialised reads of every kernel, on a machine with a GPU.
# usage: bench/sanitize.sh [memcheck|racecheck|initcheck ...]    default: the first two
set -euo pipefail
cd "$(dirname "$0")/.."
command -v compute-sanitizer >/dev/null || {
    echo "compute-sanitizer is not in PATH; it comes with the CUDA toolkit" >&2
    exit 2
}
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck)
for tool in "${tools[@]}"; do
    echo "== $tool"
    # one process, cache allocator off: each tensor is an allocation of its own, with its own bounds
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        --launch-timeout 600 python -m pytest -q -x -m gpu tests/kernels \
        -k "not fresh_inputs and not captured"
done
