"""Trained weights: loading, start values, import and export.

loading.py     the door of everything that reads weights: `load` gives `Weights`
restore.py     behind it: arrays of a checkpoint of ours
images.py      what `Weights.features` accepts as images
classifier.py  the door to a probe or fine-tuned network, with its classes
init_from.py   the door of a training run that starts from weights
export.py      the door out: files of other code bases
torch_io/      behind these: .pth and .safetensors files, without PyTorch

The commands --mode=import and --mode=export are `attmask_jax.interchange`.
"""
