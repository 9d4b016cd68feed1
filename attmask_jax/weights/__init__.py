"""Trained weights: loading, initialisation, import and export.

loading.py     `load` reads weights of any kind and returns `Weights`
restore.py     reads arrays of our checkpoints
images.py      converts images for `Weights.features`
classifier.py  loads a probe or fine-tuned network, with its classes
init_from.py   initialises a training run from weights
export.py      writes files of other code bases
torch_io/      reads and writes .pth and .safetensors files, without PyTorch

The commands --mode=import and --mode=export are `attmask_jax.interchange`.
"""
