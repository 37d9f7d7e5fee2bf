"""Folders as on the Hugging Face hub, config.json and *.safetensors: what is the same for every model.

config_file        values of a config.json, checked one by one
safetensors_file   what a file holds, by its header, and whether it is whole
folder             the files of a folder, with and without an index
match              which tensor of a folder is which of a model, and what is missing or left over
tensors            rows of tensors, read by the ranks that need them
source             folders as the source of a model's weights
checkpoint         folders as a training checkpoint
export             a training checkpoint as a folder
torch_files        files of torch.save, opened for their tensors alone
writing            tensors as the files of a folder

The first three import no torch.

Which name of theirs is which of ours is said next to each model: hf_config.py (sizes) and hf.py (weights).
"""
