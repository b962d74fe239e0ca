"""Losses of language models, token by token, without logits of all tokens."""

from dtensor_ring.losses.chunked import chunked_cross_entropy
from dtensor_ring.losses.recomputed import chunked_losses
from dtensor_ring.losses.terms import IGNORED, Terms, check_terms, chunk_tokens, token_losses

__all__ = ["IGNORED", "Terms", "check_terms", "chunk_tokens", "chunked_cross_entropy", "chunked_losses", "token_losses"]
