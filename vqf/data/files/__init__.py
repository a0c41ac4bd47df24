"""Images in folders: listing, datasets and pairs of an image and its condition map."""
