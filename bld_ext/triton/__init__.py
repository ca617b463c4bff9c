"""Triton kernels, one file a kernel; with TRITON_INTERPRET=1 they run on a CPU too, slowly."""
