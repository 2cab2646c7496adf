#!/usr/bin/env bash
# One machine with GPUs, a TPU VM, or a CPU. All GPUs or TPU chips are used, or fewer if their number
# does not divide finetune.batch. docs/devices.md says more.
#
# After an interruption, start it again with the same arguments to resume the run.
#
#     launch/local.sh configs/cifar100.py:w3a3 runs/c100-w3a3 [--config.FIELD=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" # faster steps on a CPU: docs/performance.md
config=$1 workdir=$2
shift 2
exec "${PYTHON:-.venv/bin/python}" -m hast_jax.main --config="$config" --workdir="$workdir" "$@"
