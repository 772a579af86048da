"""What is made and sealed: one file a stage."""
