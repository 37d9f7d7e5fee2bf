"""Mathematics that every model shares. No mesh, no file, no option.

attention          one call, several backends: flex (GPU), segment_attention (CPU)
masks              who may attend to whom, as data that each backend reads
rope               rotary positions; rope_scaling: Llama 3.1's, as data
cross_entropy      loss in chunks, so that all logits never exist
lora               a frozen linear map with an adapter
init               initial weights that do not depend on how a model is sharded
"""
