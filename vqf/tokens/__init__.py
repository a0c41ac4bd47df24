"""What the tokens of an image mean, and the prefix in front of them."""
