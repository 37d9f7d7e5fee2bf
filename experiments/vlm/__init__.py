"""The vision-language experiment: what it brings to the trainer (spec), and its options (config).

batch         the batch contract: every field, its shape and its padding
data/         from shards to batches          model/     encoder, projector, decoder as one model
evaluate/     tasks and their scores          generate/  prompts to answers
prepare/      records with addresses to shards           view/, world/  pictures of batches; embedded data

parallelism/  which module gets which layout     weights/   Hugging Face folders in and out
costs/        estimates, FLOPs, what to tune

job           config, check, model_config (which model a job trains), saved_model (that of a run that is over)
for others    processor (tokenizer, template and image processor, as transformers opens them)
files         cache_folder (what can be made again), tar_file (tars of samples, byte by byte alike)
"""
