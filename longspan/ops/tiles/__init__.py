"""What attention kernels are made of."""
