"""What the command line does: one module per job, with the function of its name."""
