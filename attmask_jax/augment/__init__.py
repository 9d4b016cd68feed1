"""Augmentation: on the host with Pillow, and mixing on the device.

`TRANSFORMS` holds the recipes by the names that `data.transform` takes.
"""

from attmask_jax.augment import pair, supervised, transforms

TRANSFORMS: dict[str, type[transforms.Recipe]] = {
  "multi_crop": transforms.MultiCrop,
  "crop_flip": supervised.CropFlip,
  "supervised": supervised.Supervised,
  "two_colours": pair.TwoColours,
  "centre_crop": pair.CentreCrop,
}
