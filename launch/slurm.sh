#!/usr/bin/env bash
# sbatch --nodes=2 launch/slurm.sh --config configs/lora_clip_l14_336.yaml --out=runs/lora
# One task per node, one rank per GPU. Two minutes before its time is up (or when it is preempted)
# the job gets SIGTERM: the trainer finishes its step and saves, the job puts itself back into the
# queue, and the next one resumes. Options of sbatch (--time, --partition, --gpus-per-node) win over
# those below. RANKS: ranks per node, if not one per GPU.
#SBATCH --job-name=clipsmall
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ranks=${RANKS:-${SLURM_GPUS_ON_NODE:-8}}

# how long torchrun lets a step and its save take after SIGTERM; 30 s otherwise
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"

stopped=
trap 'stopped=1; kill -TERM "$step" 2>/dev/null' TERM
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$ranks" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$head:${PORT:-29500}" \
    clipsmall/train.py "$@" --resume=auto &
step=$!
wait "$step"; status=$?
# a trapped signal ends the first wait
while [ -n "$stopped" ] && kill -0 "$step" 2>/dev/null; do wait "$step"; done

if [ -n "$stopped" ]; then
    echo "stopped by a signal: back into the queue"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
