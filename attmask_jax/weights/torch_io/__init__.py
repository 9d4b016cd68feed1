"""Reads and writes PyTorch weights without PyTorch.

pth.py          .pth files to NumPy arrays and back, without running their code
unpickling.py   reads the pickles in them;  pickling.py  writes them
tensors.py      .safetensors files;  lazy.py  tensors that are read on demand
names.py        converts between our parameter trees and the names of other
                code bases, by one table;  tables.py  the tables
fixed.py        recognises fixed position tables
layouts.py      recognises the code base of a state dict;  sizes.py  its sizes
networks.py     builds its network
files.py        loads a file as such a network, with the modules above
hf_config.py    config.json for transformers

`export.py`, one level up, writes files from weights.
"""
