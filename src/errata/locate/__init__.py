"""Where a model keeps a fact: causal tracing, its averages and its figures."""
