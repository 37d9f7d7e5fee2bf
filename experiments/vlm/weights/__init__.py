"""Weights in and out: from folders of Hugging Face and files of Megatron to checkpoints, and back.

initial_weights   what a job starts from; embedding_rows: how many rows its token embedding has
export            a checkpoint as a folder that transformers opens; adapter: [lora] as peft has it
megatron          Megatron's files as such a folder; megatron_ranks: those of its ranks as one
"""
