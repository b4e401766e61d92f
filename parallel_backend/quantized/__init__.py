"""Quantised weights: kept as their file has them, dequantised where they are used."""
