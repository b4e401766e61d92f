"""What ranks ask of NCCL, recorded call by call on gloo and played under NCCL's rules: order, matches, no standstill."""
