"""Evaluations: from frozen features to named numbers.

`features.extract(features_fn, batches)` runs a compiled function over padded
batches (`images` [B, H, W, 3] uint8, `label`, `index` int32, `valid` bool,
False = padding row) and gives the valid rows; `knn` and `clusters` turn arrays
into numbers; `visualize` draws; `online` is what a training run asks for.

Counts are summed over every valid row of all batches and divided once: never a
mean of means. Result names are relative ("k10/top1"); the caller puts the
evaluation's name in front when it logs them. No module here imports the
training loop or a named method.
"""
