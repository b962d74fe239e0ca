"""Plans, the executor that walks them, kernels, and the operators with their sharding rules."""
