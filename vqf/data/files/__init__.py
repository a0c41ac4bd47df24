"""Images that are files: listing, train/validation split, datasets, and pairs of image and condition map."""
