"""How good a trained model's answers are, by what `generate` says.

evaluation    a task over a file: answers, shared by ranks and resumed; then scores, summary and page
training_tasks    the same while a model trains, from memory; exhibits: what TensorBoard and wandb show of it
asking        records -> prompts, and what the model said to each
tasks         how a question is worded, how it is answered and which scores it gets, as rows
questions     records that ask and know the answer
likelihood    how likely the model finds a choice, or a document
task_scores   answers -> figures; metrics: scores of answers against references
results_page  pictures, questions, answers and scores
lmms_requests what lmms-eval asks, answered (experiments/commands/lmms_plugin.py)
"""
