"""Files of others: queries in, preference data in and out."""
