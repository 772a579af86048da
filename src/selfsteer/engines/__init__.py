"""Who samples: requests in, completions out as they finish."""
