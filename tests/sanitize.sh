#!/usr/bin/env bash
# The CPU kernels, and the CUDA kernels in emulation, under the compiler's address and undefined-behaviour sanitizers:
# reads and writes outside of tensors, misaligned accesses, overflowing shifts. `make sanitize`; g++, ten minutes.
# On a GPU compute-sanitizer does this for the real thing (bench/gpu.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(cd "${1:?usage: tests/sanitize.sh FOLDER_WITH_PYTHON}" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
CXXFLAGS="$flags -g1" LDFLAGS="$flags" SAMA_KERNELS_CUDA=0 \
    "$bin/python" setup.py -q build --build-base "$scratch/objects" --build-lib "$scratch/packages"

# pytest, not `python -m pytest`, which would put this folder, and the kernels built in it, first. -s: the report of an
# error ends the process, which would take what pytest has captured with it.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 OMP_NUM_THREADS=1 \
    PYTHONPATH="$scratch/packages" SAMA_TEST_SANITIZED="$scratch/packages" \
    "$bin/pytest" -s -q -x -p no:cacheprovider tests/test_ops.py tests/test_ops_moments.py tests/test_ops_low_bit.py \
    tests/test_rounding.py tests/test_mask_draws.py tests/test_adaptation.py tests/test_adaptation_moments.py tests/test_adaptation_moments_state.py \
    tests/test_cuda_kernels.py tests/test_cuda_moments.py tests/test_cuda_low_bit.py tests/test_cuda_launches.py
