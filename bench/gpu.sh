#!/usr/bin/env bash
# Everything that needs a GPU, within ten minutes and without a network: `make gpu` (or bench/gpu.sh).
#
#   PYTHON   the interpreter that has torch (python3)        OUT     where results go (gpu_results): at most 8 files
#   WHEELS   a folder of wheels of packages that are missing  COMMIT  what the JSON calls this tree, if not git's HEAD
#   DRY_RUN=1  go through the same steps on the CPU with small sizes, as far as they go
#   ONLY="kernels tests"  these steps alone, by the names in OUT/steps.log (the kernels must have been built before)
#
# Builds in place, runs the tests marked `gpu`, compute-sanitizer over every kernel, the benchmarks and the report. A
# step that fails or takes too long does not stop the others. OUT/summary.json says how each went; exit status 0 means
# that all of them succeeded.
set -u
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu_results}
DRY_RUN=${DRY_RUN:-0}
TOTAL=530 # seconds for all steps but the report; with it and what a kill takes 585
BEGIN=$SECONDS
PATH=$PATH:/usr/local/cuda/bin # compute-sanitizer

if ! "$PYTHON" -c 'import torch'; then
    echo "gpu.sh: $PYTHON has no torch; set PYTHON to an interpreter that has it" >&2
    exit 1
fi
if [ "$DRY_RUN" = 1 ]; then
    device=cpu
    export CUDA_VISIBLE_DEVICES=
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} # for one GPU too
elif capability=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null); then
    device=cuda
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} # only for the GPU that is here: a shorter build
else
    echo "gpu.sh: no GPU: torch sees no CUDA device. DRY_RUN=1 goes through the steps on the CPU." >&2
    exit 1
fi

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
rm -f "$OUT"/{summary.json,steps.log} "$OUT"/{kernels,meta_step,scaling,algorithms}_*
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
touch "$scratch/steps"
export PYTHONPATH="$PWD:$PWD/python:$scratch/packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton" MPLCONFIGDIR="$scratch"

LARGE=more_elements_than_32_bits_count # tests that take up to 34 GB of the GPU's memory each, or are skipped

# wanted NAME: whether ONLY lets this step run.
wanted() { [[ -z "${ONLY:-}" || " $ONLY " == *" $1 "* ]]; }

# step NAME LIMIT COMMAND...: run it for at most LIMIT seconds, less if the time for all steps runs out; note the result.
step() {
    wanted "$1" || return
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    local left=$((TOTAL - (SECONDS - BEGIN)))
    [ "$limit" -gt "$left" ] && limit=$left
    echo "=== $name (at most $limit s): $*" | tee -a "$OUT/steps.log"
    if [ "$limit" -gt 0 ]; then
        # Ctrl-C first: pytest then still writes its XML and what failed, the benchmarks what they have.
        timeout --signal=INT --kill-after=8 "$limit" "$@" 2>&1 | sed -u "s#^#$name| #" >>"$OUT/steps.log"
        status=${PIPESTATUS[0]}
    else
        status=124
    fi
    echo "=== $name: exit status $status after $((SECONDS - begin)) s" | tee -a "$OUT/steps.log"
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" "$limit" >>"$scratch/steps"
}

# skip NAME WHY: note that a step was left out.
skip() {
    wanted "$1" || return
    echo "=== $1: skipped, $2" | tee -a "$OUT/steps.log"
    printf '%s\tskipped\t0\t%s\n' "$1" "$2" >>"$scratch/steps"
}

# sanitize TOOL BACKEND DTYPES OPTION...: run every kernel, for these dtypes, under a tool of compute-sanitizer.
sanitize() {
    local tool=$1 backend=$2 dtypes=$3
    shift 3
    if command -v compute-sanitizer >/dev/null; then
        # Without torch's caching allocator every tensor is an allocation of its own, with an end that is watched.
        # The tool stays out of the compilers that Triton starts.
        step "${tool}_$backend:${dtypes// /,}" 260 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "$@" \
            --target-processes application-only --error-exitcode 9 --print-limit 20 \
            "$PYTHON" -m bench.sanitize --backends "$backend" --dtypes $dtypes
    else
        skip "$tool" "compute-sanitizer is not in PATH"
    fi
}

if [ -n "${WHEELS:-}" ]; then
    step wheels 60 "$PYTHON" -m pip install --no-index --no-deps --target "$scratch/packages" "$WHEELS"/*.whl
fi
[ "$device" = cuda ] && export SAMA_KERNELS_CUDA=1 # an error, not a build without CUDA kernels
step build 150 "$PYTHON" setup.py build_ext --inplace --force --build-temp "$scratch/build"
if [ "$device" = cuda ]; then
    # Whatever is not timed runs at the same time; most of it is the compilation of Triton kernels.
    workers=() # a thousand tests, some of which compile or start processes of their own
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 4 --dist loadfile)
    # On 16 processors with an H100 they take 243 to 250 s beside all the others.
    step tests 260 "$PYTHON" -m pytest -v --tb=short -m gpu "${workers[@]}" --ignore tests/test_triton_kernels.py \
        -k "not $LARGE" --junitxml "$scratch/tests.xml" -p no:cacheprovider &
    step tests_large 240 "$PYTHON" -m pytest -q -m gpu tests/test_cuda_{launches,moments,low_bit}.py -k "$LARGE" \
        -p no:cacheprovider & # one after the other
    for part in values:1/3 values:2/3 values:3/3 moments:1/3 moments:2/3 moments:3/3 low_bit:1/2 low_bit:2/2 contract:1/1; do
        step "triton_$part" 240 env SAMA_TEST_SHARD="${part#*:}" "$PYTHON" -m pytest -q "tests/triton_${part%:*}.py" \
            -p no:cacheprovider &
    done
    # API errors that torch causes and handles are no fault of the kernels, whose launches are checked where they happen.
    sanitize memcheck cuda "fp32 bf16 bf16-fp32state fp16-fp32state fp64" --report-api-errors no &
    # Each of Triton's 120 variants takes half a second to compile: 65 s for three dtypes alone, 240 s beside all the others.
    sanitize memcheck triton "fp32 fp64" --report-api-errors no &
    sanitize memcheck triton "bf16 bf16-fp32state" --report-api-errors no &
    sanitize memcheck triton "fp16-fp32state" --report-api-errors no &
    for backend in cuda triton; do
        sanitize racecheck $backend "fp32 bf16-fp32state" & # races and barriers are the same in all 16-bit types
    done
    sanitize synccheck cuda "fp32 bf16-fp32state" & # every lane there where lanes exchange words, which only these do
    # torch's own detector of races between streams.
    step streams 240 env TORCH_CUDA_SANITIZER=1 "$PYTHON" -m pytest -q -m gpu tests/test_overlap.py -p no:cacheprovider &
    wait
    step kernels 165 "$PYTHON" -m bench.kernels --out "$OUT" --seconds 0.5 --stop-after 140 \
        --compile-at-most 1 --lists bert-base flat llama-1b
    # Tiny tensors: where the host's time counts. Most of the step is the reference, a tensor at a time.
    step kernels_tiny 40 "$PYTHON" -m bench.kernels --out "$OUT" --more --seconds 0.7 --stop-after 25 --compile none \
        --lists tiny --dtypes fp32 --ops adapt_norm_adam perturb_plus restore element_wise_part
    step meta_step_base 50 "$PYTHON" -m bench.meta_step --model base --batch 32 --tokens 128 --rounds 10 --out "$OUT"
    step meta_step_small 40 "$PYTHON" -m bench.meta_step --model small --batch 16 --tokens 64 --out "$OUT"
    step scaling 60 "$PYTHON" -m bench.scaling --quick --no-plots --out "$OUT" # NCCL, as many processes as GPUs
    step algorithms 60 "$PYTHON" -m bench.algorithms --model small --batch 16 --tokens 64 --seconds 5 --out "$scratch/algorithms"
    wanted algorithms && cp "$scratch"/algorithms/*.jsonl "$OUT" # not its table and its plot: OUT takes 8 files
else
    step tests 120 "$PYTHON" -m pytest -q -m gpu --junitxml "$scratch/tests.xml" -p no:cacheprovider
    step sanitizer_driver 75 "$PYTHON" -m bench.sanitize
    skip memcheck "it needs a GPU"
    skip racecheck "it needs a GPU"
    skip synccheck "it needs a GPU"
    skip streams "it needs a GPU"
    step kernels 190 "$PYTHON" -m bench.kernels --quick --out "$OUT" --lists flat tiny bert-base
    step algorithms 60 "$PYTHON" -m bench.algorithms --quick
    step meta_step_tiny 60 "$PYTHON" -m bench.meta_step --model tiny --batch 2 --tokens 8 --rounds 3 --out "$OUT"
    step scaling 90 "$PYTHON" -m bench.scaling --quick --no-plots --out "$OUT"
fi
TOTAL=$((TOTAL + 25))
step report 25 "$PYTHON" -m bench.report --results "$OUT"
"$PYTHON" -m bench.gpu_summary "$scratch" "$OUT" --device "$device"
