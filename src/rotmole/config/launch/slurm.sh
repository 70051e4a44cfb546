#!/bin/bash
# Slurm: a job on one or several nodes that is requeued until training is complete.
#   sbatch slurm.sh
# Put it beside run.yaml, on a disk that all nodes share; README's "Install" for the environment.
#SBATCH --job-name=rotmole
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8         # one process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120           # two minutes before the end: the processes save and stop
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# source .venv/bin/activate         # the environment that has rotmole, on the shared disk

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # two jobs on one node need two ports
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

run() {  # each task is one process; srun passes signals to all of them
    # shellcheck disable=SC2016  # the variables are those of the task, not of this script
    srun --kill-on-bad-exit=1 bash -c \
        'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' task "$@"
}

run rotmole train run.yaml --resume auto training.fsdp=true
code=$?
if [ "$code" -eq 143 ]; then        # stopped by the signal, checkpoint saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
