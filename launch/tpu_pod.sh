#!/usr/bin/env bash
# A slice of a TPU pod, one process for each host. Every host needs the project in ~/hast_jax, with pip install -e '.[tpu]' in
# its .venv ('.[tpu,torch]' for .pth weights). The run folder must be on a file system that all hosts see (Filestore).
#
#     launch/tpu_pod.sh NAME ZONE configs/imagenet.py:w4a4 /mnt/runs/r18-w4a4 [--config.FIELD=VALUE ...]
#
# After an interruption, start it again with the same arguments to resume the run.
set -euo pipefail
name=$1 zone=$2 config=$3 workdir=$4
shift 4
printf -v arguments '%q ' --config="$config" --workdir="$workdir" "$@"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="cd ~/hast_jax && .venv/bin/python -m hast_jax.main --processes=auto $arguments"
