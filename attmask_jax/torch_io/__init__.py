"""PyTorch weights in and out, without PyTorch.

pth.py        .pth files as NumPy arrays, and back; runs nothing they ask for
tensors.py    the same for .safetensors
names.py      our parameter trees under the names of other code bases, and back
"""
