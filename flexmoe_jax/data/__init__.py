"""Documents, tokenizers, token stores, batches, domain embeddings and proxies."""
