# Megatron-LM core_v0.19.0: the best plan of deepseek_v3 on 1024 ranks of dgx_h100, by piper_hpc.
# Names as documented on 2026-08-19 in
# https://github.com/NVIDIA/Megatron-LM/blob/core_v0.19.0/megatron/training/arguments.py
# World size 1024: pp 16 x dp 32 x cp 2 x tp 1; of experts pp 16 x dp 4 x ep 16 x etp 1.
# Predicted for task.executor=megatron: 2.5 s a step of 1920 sequences of 4096 tokens,
# 400,000 tokens/s, 50 of 80 GiB on the fullest rank.
# Use: source THIS_FILE; torchrun ... pretrain_gpt.py "${MEGATRON_ARGS[@]}" ... with your data, tokenizer and
# learning rate.
# export CUDA_DEVICE_MAX_CONNECTIONS=1 before, on devices older than Blackwell: tp and cp ask for it.
#
# What is not as in the plan:
# - parallelism.all_to_all=halo_dedup: Megatron-LM's own all-to-all sends every row to its own rank; dispatch
#   and combine may take longer.
# - parallelism.placement=strided: Megatron-LM numbers the ranks of an expert group one after the other
#   (linear); order the hosts yourself.
# - recompute=norm+activation+mla_up: --recompute-modules mlp shared_experts computes the whole of what
#   Megatron-LM cannot recompute the activation of alone: no more memory than planned, and more time.
# - Rotary positions of latent attention are scaled as Megatron-LM does by default (YaRN): see --rope-type.
MEGATRON_ARGS=(
    # the model
    --num-layers 61
    --hidden-size 7168
    --ffn-hidden-size 18432
    --num-attention-heads 128
    --multi-latent-attention
    --q-lora-rank 1536
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --qk-layernorm
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --norm-epsilon 1e-06
    --max-position-embeddings 4096
    --vocab-size 129280
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --position-embedding-type rope
    --rotary-base 10000
    --untie-embeddings-and-output-weights
    --num-experts 256
    --moe-ffn-hidden-size 2048
    --moe-router-topk 8
    --moe-aux-loss-coeff 0.0001
    --moe-grouped-gemm
    --moe-layer-freq '([0]*3+[1]*58)'
    --moe-shared-expert-intermediate-size 2048
    --moe-router-num-groups 8
    --moe-router-group-topk 4
    # batch
    --seq-length 4096
    --micro-batch-size 1
    --global-batch-size 1920
    # parallelism
    --tensor-model-parallel-size 1
    --context-parallel-size 2
    --pipeline-model-parallel-size 16
    --pipeline-model-parallel-layout 'Et*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*3|t*3|t*3L'
    --expert-model-parallel-size 16
    --expert-tensor-parallel-size 1
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    # routing
    --moe-token-dispatcher-type alltoall
    # precision and recomputation
    --bf16
    --cross-entropy-loss-fusion
    --recompute-granularity selective
    --recompute-modules layernorm moe_act mla_up_proj shared_experts mlp
)
