"""Augmentation: on the host with Pillow, and mixing on the device."""
