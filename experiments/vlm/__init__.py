"""The vision-language experiment: what it brings to the trainer (spec), and its options (config).

batch         the batch contract: every field, its shape and its padding
data/         from shards to batches          model/     encoder, projector, decoder as one model
evaluate/     tasks and their scores          generate/  prompts to answers
prepare/      records with addresses to shards           view/, world/  pictures of batches; embedded data

job           config, check, model_config (which model a job trains), saved_model (that of a run that is over)
layouts       parallelize, pipeline (stages: which layers where), encoder_parallel, sharing (of the encoding),
              shard_batch (a rank's share of a batch), read_once (one rank reads for all with its slots)
costs         flops; estimate (rank_share: what a rank's units need; recomputation: for a memory budget),
              run_cost, tuning (what `tune` may change)
weights       initial_weights, embedding_rows, adapter ([lora] for peft), megatron, megatron_ranks
for others    export (a Hugging Face folder), processor (its tokenizer, template and image processor)
files         cache_folder (what can be made again), tar_file (tars of samples, byte by byte alike)
"""
