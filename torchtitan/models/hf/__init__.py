"""Folders as on the Hugging Face hub, config.json and *.safetensors: what is the same for every model.

config_file     values of a config.json, checked one by one; imports no torch

Which name of theirs is which of ours is said beside each model: hf_config.py (sizes) and hf.py (weights).
"""
