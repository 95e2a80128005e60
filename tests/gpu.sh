#!/usr/bin/env bash
# Does it run on a GPU, and how fast? One call of under ten minutes, on a bare machine without network.
#
#     tests/gpu.sh --json gpu.json                                  on the GPU; the demo stands in for a real model
#     tests/gpu.sh --json gpu.json --model DIR --rows FILE --dev DIR    200 DREAM steps on a real checkpoint
#     tests/gpu.sh --device cpu --quick                             every part, tiny, on a CPU: two minutes
#     WHEELS=wheels tests/gpu.sh --json gpu.json                    packages that are missing there come along
#
# Needs Python 3.10 with torch 2.11 or later, as $PYTHON (default: python3). All else is in requirements.txt:
# safetensors, tokenizers, numpy, pytest, tqdm. What the machine lacks of these lies as wheels, with what they
# need in turn, in the folder $WHEELS (`pip download --no-deps -d wheels ...`, for that machine's Python); all of
# it is unpacked into a temporary folder, and the machine's own packages stay as they are.
set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --find-links "$WHEELS" --no-deps --no-compile --no-cache-dir \
        --target "$scratch/site" "$WHEELS"/*.whl || echo "the wheels in $WHEELS could not all be installed" >&2
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi
# Processes that talk to one another are all on this machine, which may not know its own name.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
# Goes on after a failure: each part is a process of its own. Its status is 1 where one failed or was not run.
PYTHONUNBUFFERED=1 "$python" tests/gpu.py --folder "$scratch" "$@"
