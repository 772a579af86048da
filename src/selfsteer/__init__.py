"""selfsteer: align a chat model without human labels, by Self-Steering Optimization (arXiv 2410.17131)."""
