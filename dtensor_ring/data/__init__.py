"""Batches: reading their documents, and cutting them into the shares of the ranks."""

from dtensor_ring.data.ahead import plan_ahead
from dtensor_ring.data.batch import ShardedBatch, shard_batch
from dtensor_ring.data.samplers import sequence_sampler

__all__ = ["ShardedBatch", "plan_ahead", "sequence_sampler", "shard_batch"]
