"""What a person reads: tables, pages, plots, the model card."""
