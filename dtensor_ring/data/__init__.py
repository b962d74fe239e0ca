"""Batches: reading their documents, and cutting them into the shares of the ranks."""

from dtensor_ring.data.batch import ShardedBatch, shard_batch

__all__ = ["ShardedBatch", "shard_batch"]
