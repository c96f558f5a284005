"""What a run tells its server, shown by attacks."""
