"""Who prefers: LLMs, reward models, the policy itself."""
