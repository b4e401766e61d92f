"""The CUDA path on a build of torch without CUDA: tensors of device cuda that have shapes and no values, and ranks alone."""
