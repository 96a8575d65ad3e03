#!/usr/bin/env bash
#SBATCH --job-name=sppo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# One run over several nodes, which continues in the next job until it has taken all of its steps:
#
#     sbatch examples/cluster/slurm.sh recipe.yaml --output_dir /shared/out
#
# The recipe, local models, datasets and output_dir are in a folder that all nodes share. Five minutes before the time
# limit, and when the job is preempted, SLURM sends SIGTERM: the run saves a checkpoint, and the job is queued again.
set -uo pipefail

export PORT=${PORT:-29500}
export FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1}))
export CACHE=${SLURM_TMPDIR:-/tmp}/sppo-$SLURM_JOB_ID  # on the node's own disk

# One task per node. exec makes trl-sppo the task, so that signals reach it
srun --kill-on-bad-exit=1 bash -c '
    export TRITON_CACHE_DIR=$CACHE/triton TORCHINDUCTOR_CACHE_DIR=$CACHE/inductor VLLM_CACHE_ROOT=$CACHE/vllm
    export HF_DATASETS_CACHE=$CACHE/datasets
    exec trl-sppo train --config "$@" --resume_from_checkpoint true \
        --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$PROCESSES" \
        --main_process_ip "$FIRST_NODE" --main_process_port "$PORT"
' sppo "$@"
code=$?

case $code in
    124 | 143) scontrol requeue "$SLURM_JOB_ID" ;;  # the time budget, or SIGTERM: there is a checkpoint
    *) exit $code ;;
esac
