"""Augmentation: with Pillow on the host, and mixup on the device.

`TRANSFORMS` holds the recipes by name, for `data.transform`.
"""

from attmask_jax.augment import pair, supervised, transforms

TRANSFORMS: dict[str, type[transforms.Recipe]] = {
  "multi_crop": transforms.MultiCrop,
  "crop_flip": supervised.CropFlip,
  "supervised": supervised.Supervised,
  "two_colours": pair.TwoColours,
  "centre_crop": pair.CentreCrop,
}
