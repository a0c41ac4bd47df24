"""Loading of training images and tokens."""
