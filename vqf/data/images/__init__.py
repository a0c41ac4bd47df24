"""Images as tensors: decoding, condition maps, cropping, resizing and augmentation."""
