"""Reading, making and serving comparisons."""
