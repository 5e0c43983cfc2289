#!/usr/bin/env bash
# bash launch/cpu_ranks.sh 8 --config configs/demo.yaml --out=runs/eight
# Ranks on one machine's CPU, over gloo, to try what several GPUs would do. (accelerate launch --cpu
# --num_processes 8 silently starts ONE process, huggingface/accelerate#2741; torchrun starts
# eight.)
set -euo pipefail
ranks=${1:?how many ranks}
shift
exec env ACCELERATE_USE_CPU=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
    torchrun --standalone --nproc_per_node "$ranks" clipsmall/train.py "$@"
