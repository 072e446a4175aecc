"""From documents to batches of token blocks."""
