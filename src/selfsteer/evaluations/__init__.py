"""Is the policy better? Benchmarks, win rates, reward benchmarks: each a file here, none of them known to another."""
