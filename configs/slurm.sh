#!/bin/bash
# One run of srmu on several machines: sbatch configs/slurm.sh CONFIG [key=value ...] [--shard]
# Runs and the model must lie on storage that all machines see. A run that is cut off goes on from
# its last checkpoint when the same command is given again.
#SBATCH --job-name=srmu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=04:00:00
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HF_HUB_OFFLINE=1  # fetch model and texts before: compute nodes often see no network
export OMP_NUM_THREADS=4

srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
    -m srmu unlearn "$@"
