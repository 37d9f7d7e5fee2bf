"""The model: vision encoder -> projector -> places among the token embeddings -> decoder. Mathematics alone.

vlm         the whole: projector, visual tokens placed among the text, composition
vit         the encoder, on packed rows of patches; patch_embedding: what its first layer reads
positions   where patches are: learned tables, resized to every image, waves, angles
config      sizes and kinds of the parts, as data
towers/     families of encoders: their words for sizes, their names of weights
flavors     sizes of whole models, as rows; cards: as the page docs/models.md
families/   whole models of transformers: sizes in its words, where parts stand in files, image processors
hf_config   sizes in the words of Hugging Face, of whole models and of parts
hf          names and shapes of published weights

The decoder is torchtitan/models/decoder. Which module gets which layout: vlm/parallelism/parallelize.py.
"""
