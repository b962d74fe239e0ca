"""What carries a plan out on tensors: the plan executor with its exchange, ulysses, and groups of heads."""
