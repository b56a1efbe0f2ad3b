"""What a run tells its user beside the harness's own tables; `sdar_lm_eval` on finished runs."""
