"""Your own package, next to your data and notebooks; it need not be installed."""
