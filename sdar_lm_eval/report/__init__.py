"""What a run tells its user beside the harness's own tables; `python -m sdar_lm_eval.report` on finished runs."""
