"""Text from a model: nothing here knows of images, training or files.

options     sampling options, without torch
sampling    logits -> the next token, by options and one number
kv_cache    keys and values of what was read, in place of each layer's attention
answer_text ids -> text as it becomes certain; stop strings
engine      prompts -> answers: a batch of fixed shape, refilled as its sequences end
"""
