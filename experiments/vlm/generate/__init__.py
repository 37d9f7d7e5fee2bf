"""Answers of a vision-language model, by the path that training takes: parts -> sample -> patches -> batch.

prompt      turns or a text with images, as tokens and arrays
layout      the model over ranks, and its cache
forward     the model with its cache, as the engine runs it
"""
