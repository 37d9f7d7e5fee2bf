"""How each layout works, whatever the model; which module gets it is said with the model (parallelize.py).

mesh                  five dimensions of ranks, and the meshes that layouts are made of
fsdp                  parameters divided over ranks, and copied where asked (HSDP)
tensor_parallel       heads, columns and the vocabulary divided
context_parallel      the tokens of a slot divided
pipeline_parallel     the layers divided; stages: which rank holds which
slot_group            the ranks that hold the same slots, of which one reads
activation_checkpoint, compile      block by block, before FSDP wraps them
collectives           sums of host numbers; differentiable: collectives that gradients flow through
grad_norm             one norm over parameters of several meshes
process_group         start and end of communication, and which rank failed when it hangs

estimate              memory and traffic of a layout without running it: footprint watches units of a model on
                      the meta device, imagined lends them ranks that are not there
"""
