"""Log-likelihoods: `scoring.py` runs batches of requests (`batches.py`) as rows (`rows.py`) of trunks (`trunks.py`)."""
