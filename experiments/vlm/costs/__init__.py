"""What a job costs, before it runs and while it runs.

flops           of a batch, without padding
estimate        memory, FLOPs and traffic of a layout; rank_share: what a rank's units hold, keep and send
recomputation   the least that stays within a memory budget
run_cost        a whole run, for a dry run
packing_advice  which S and L waste least on a data set (command `advise`), by packing_simulation
tuning          what `tune` may change of a job, and which of it fits the device
"""
