"""Empty: the adapter only looks whether this package is installed."""
