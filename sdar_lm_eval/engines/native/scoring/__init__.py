"""Log-likelihoods on the device: `scoring.py` runs batches (`batches.py`) as rows of forwards (`rows.py`)."""
