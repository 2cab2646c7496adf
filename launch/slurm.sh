#!/usr/bin/env bash
# Several GPU machines under Slurm, one process a GPU:
#
#     sbatch --nodes=2 launch/slurm.sh configs/imagenet.py:w4a4 /mnt/runs/r18-w4a4 [--config.FIELD=VALUE ...]
#
# It needs '.[cuda]', and '.[torch]' for .pth weights, in .venv. The run folder must be on a file system that all machines see. Two
# minutes before its time is up the job gets SIGTERM, to save at the next step that is logged; where that comes too late, in a long
# evaluation, the last epoch is what is kept. A job that was stopped so ends with status 75. The same command goes on, on any number of GPUs that divides finetune.batch; change
# --gres and --ntasks-per-node together where a machine has not 4.
#SBATCH --job-name=hast_jax
#SBATCH --gres=gpu:4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
config=$1 workdir=$2
shift 2
exec srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m hast_jax.main --processes=auto \
    --config="$config" --workdir="$workdir" "$@"
