"""Which module of the VLM gets which layout; how a layout works is said in torchtitan/distributed.

parallelize        the order in which layouts are applied, and FSDP's groups
encoder_parallel   the encoder in ranks with the same slots; sharing: how many of them share its images
shard_batch        a rank's share of a batch; read_once: one rank reads for all that hold the same slots
pipeline           the stages of a pipeline; stages: which layers lie on which
"""
