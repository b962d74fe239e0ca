"""Batches: reading their documents, and cutting them into the shares of the ranks."""

from dtensor_ring.data.ahead import plan_ahead
from dtensor_ring.data.batch import ShardedBatch, shard_batch

__all__ = ["ShardedBatch", "plan_ahead", "shard_batch"]
