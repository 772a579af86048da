"""What survives a kill: durable files, the journal of finished samples, the run folder, its columns."""
