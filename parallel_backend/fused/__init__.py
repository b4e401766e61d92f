"""Kernels of our own: small ones that read and write a tensor once where torch's operations do several times."""
