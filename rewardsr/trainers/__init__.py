"""Training methods: what is sampled and what is learnt from it."""
