"""What becomes of a bundle's resident tensors and experts modules before a model runs.

interface.py   experts modules that ask for another arithmetic than records have are refused
tied.py        which embeddings share a tensor: what the bundle holds decides, as in transformers' from_pretrained
"""
