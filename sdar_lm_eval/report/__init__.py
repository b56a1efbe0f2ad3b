"""What a run tells its user, beside the harness's own tables."""
