"""Weights to PyTorch and back.

modeling_skysensev2.py is the PyTorch network, one file, copied into every exported directory; hf_skysensev2.py its
short Hugging Face wrapper. ``python -m skysense_jax.export`` writes such a directory, ``...export.from_torch`` makes
a checkpoint of one (or of published Swin V2 weights), ``...export.embed`` turns GeoTIFFs into a GeoTIFF of features,
``...export.onnx`` writes a graph. The first two need jax, the others PyTorch only: nothing may be imported here.
"""
