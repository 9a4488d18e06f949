"""The decoder as pure functions on arrays. Only `decoder` uses Flax.

Shape suffixes in this folder: B batch, T query tokens, S key tokens, D width, H query heads, G key/value heads, K head
size, F feed-forward width, E experts, V vocabulary, L layers, N tokens in all (B*T), k active experts, M tile rows.
In `experts` S is slots (N*k).
"""
