"""Which settings of a job train fastest on this machine, by short runs. Knows nothing of what is trained.

search    which candidate to measure next: one kind of change after the other, for as long as it helps
trial     a candidate as a short run: its job, its folder, its figures, and why it gave none
tuner     measures what the search proposes until the time is over
report    the table, tune.csv, tune.json, and the lines for the TOML
"""
