"""Images that are files."""
