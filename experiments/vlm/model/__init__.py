"""The model: SigLIP2 encoder -> projector -> places among the token embeddings -> decoder. Mathematics alone.

vlm         the whole: projector, placing, composition
vit         the encoder, on packed rows of patches; positions: learned positions, resized to every image
flavors     sizes of encoders and of whole models, as rows; cards: as the page docs/models.md
hf_config   sizes in the words of Hugging Face, both ways
hf          names and shapes of published weights

The decoder is torchtitan/models/decoder. Which module gets which layout: experiments/vlm/parallelize.py.
"""
