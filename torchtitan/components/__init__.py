"""The parts of a run. Those of a TOML section bear its name; build.py puts them together, train.py uses them.

step         forward_backward, freezing, lora, float8, optimizer (parameter_groups, muon, row_adamw),
             lr_scheduler, cuda_graph
data         loader (what the trainer asks of one), tokenizer, special_tokens, tokenizer_files, epochs,
             data_report
figures      metrics (what a step measures), sinks (metrics.jsonl, TensorBoard, wandb), curves, flops,
             run_record (all figures of a run, read again)
validation   held-out loss, and the share of documents whose every token is right
checkpoints  checkpoint, train_state (what it holds), checkpoint_folder (how it lies on the disk),
             checkpoint_read (what one says of itself), weights (of a model on ranks, and their sources),
             hf_save (the last one as a Hugging Face folder)
launches     dump_folder (a folder used again), saved_config, memory_check (does the job fit this machine)
"""
