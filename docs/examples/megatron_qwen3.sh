#!/bin/bash
# Qwen3-30B-A3B on two nodes, in the form of a launch script of Megatron-LM.
#SBATCH --nodes=2
export CUDA_DEVICE_MAX_CONNECTIONS=1

GPUS_PER_NODE=8
NNODES=${SLURM_NNODES:-2}
TP=${TP:-1}
EP=${EP:-8}
CHECKPOINT=$1

DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NNODES
)
MODEL_ARGS=(
    --num-layers 48
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 4
    --kv-channels 128
    --qk-layernorm
    --swiglu
    --normalization RMSNorm
    --untie-embeddings-and-output-weights
    --seq-length 4096
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model Qwen/Qwen3-30B-A3B
)
MOE_ARGS="--num-experts 128 --moe-ffn-hidden-size 768 --moe-router-topk 8 --moe-aux-loss-coeff 1e-3 \
    --moe-token-dispatcher-type alltoall --moe-grouped-gemm"
TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size $((64 * GPUS_PER_NODE * NNODES))
    --train-iters 1000
    --lr 1e-4 --min-lr 1e-5 --lr-warmup-iters 50
    --bf16
    --use-distributed-optimizer
    --overlap-grad-reduce
    --recompute-granularity selective
    --recompute-modules core_attn moe_act
    --optimizer-cpu-offload
)
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py ${MODEL_ARGS[@]} ${MOE_ARGS} ${TRAINING_ARGS[@]} \
    --tensor-model-parallel-size $TP \
    --pipeline-model-parallel-size 2 \
    --expert-model-parallel-size $EP \
    --save $CHECKPOINT --log-interval 10
