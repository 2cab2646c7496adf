#!/usr/bin/env bash
# Several GPU machines under Slurm, one process for each GPU:
#
#     sbatch --nodes=2 launch/slurm.sh configs/imagenet.py:w4a4 /mnt/runs/r18-w4a4 [--config.FIELD=VALUE ...]
#
# It needs '.[cuda]' in .venv, and '.[torch]' for .pth weights. The run folder must be on a file system that all machines see.
# If a machine does not have 4 GPUs, change --gres and --ntasks-per-node together.
#
# Two minutes before its time limit the job gets SIGTERM. It saves at the next logged step and ends with status 75. If no step
# is logged in time, as in a long evaluation, the checkpoint of the last epoch remains. The same command resumes the run, on any
# number of GPUs that divides finetune.batch.
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
