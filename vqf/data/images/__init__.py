"""Images and condition maps as tensors."""
