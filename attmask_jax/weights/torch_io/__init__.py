"""PyTorch weights in and out, without PyTorch.

pth.py          .pth files as NumPy arrays, and back; runs nothing they ask for
unpickling.py   the programs in them, read;  pickling.py  written
tensors.py      the same for .safetensors;  lazy.py  tensors not read yet
names.py        our parameter trees under the names of other code bases, and
                back, from one table;  tables.py  the tables
fixed.py        which position tables of files are fixed ones
layouts.py      which code base a state dict is of;  sizes.py  its sizes
networks.py     the network that belongs to it
files.py        a file as such a network, by the parts above
hf_config.py    config.json for transformers

`export.py`, one level up, writes files from weights.
"""
