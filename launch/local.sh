#!/usr/bin/env bash
# One machine with GPUs, a TPU VM, or a CPU: every local device is used; they must divide finetune.batch. Start it again after an interruption,
# with the same arguments, and it goes on where it was.
#
#     launch/local.sh configs/cifar100.py:w3a3 runs/c100-w3a3 [--config.FIELD=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" # faster steps on a CPU: docs/performance.md
config=$1 workdir=$2
shift 2
exec "${PYTHON:-.venv/bin/python}" -m hast_jax.main --config="$config" --workdir="$workdir" "$@"
