"""Evaluations: from frozen features, or a trained model, to named numbers.

Every evaluation has one shape:

  run(features: FeaturesFn, data: Iterable[Batch], cfg) -> dict[str, float]

`features` is compiled by the caller and maps images [B, H, W, 3] uint8 to
[B, F] float32. `data` yields padded batches of numpy arrays (`images`, `label`
and `index` int32, `valid` bool, False = padding row), all of the same size, so
nothing compiles twice. Counts are summed over every valid row of all batches
and divided once: never a mean of means. Result names are relative
("k10/top1"); the caller puts the evaluation's name in front when it logs them.

No module here imports the training loop or a named method.
"""
