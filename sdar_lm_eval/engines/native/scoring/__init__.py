"""Log-likelihoods: `scoring.py` runs batches of requests (`batches.py`) as rows of forwards (`rows.py`)."""
