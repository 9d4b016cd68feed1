"""Trained weights, from and to disk.

loading.py      reads one network of a run, checkpoint or file: `Weights`
images.py       arrays, Pillow images and paths as batches for them
classifier.py   reads a network together with a linear layer trained on it
init_from.py    start values of a training run, out of loaded weights
export.py       writes loaded weights under the names of another code base
torch_io/       the file formats, and whose names a file has

`interchange.py`, one level up, has the commands: import turns a file into a
checkpoint of ours, export calls `export.py`. Checkpoints of a run under way are
in `runs/checkpoint.py`.
"""
