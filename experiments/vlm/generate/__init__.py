"""Answers of a vision-language model, by the path that training takes: parts -> sample -> patches -> batch.

answering   from a job to a model that is filled, and what it takes to ask it
answer_file one answer that streams, or a file of them
chat        a conversation in a terminal
server      a page and chat completions over HTTP: service (one engine for all who ask), openai (the form)
record      a line of that file -> a prompt
prompt      turns or a text with images, as tokens and arrays
layout      the model over ranks, and its cache
forward     the model with its cache, as the engine runs it
"""
