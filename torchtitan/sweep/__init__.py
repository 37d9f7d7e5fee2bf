"""Many runs of one job, each with other options. Knows nothing of what is trained.

options   what is asked for: [sweep] of a job file, and the command line
space     which combinations: a grid, options that go together, draws
members   the run of each: its job, and the folder named by what differs
status    what has become of it: new, cut, failed, running, finished
places    GPUs or cores for several runs at a time
run       starts them, stops them
slurm     an array script in place of that
results   the figures of all runs: a table, sweep.csv
picture   sweep.png: curves, and
panels    the panels below them, one for each swept option
"""
