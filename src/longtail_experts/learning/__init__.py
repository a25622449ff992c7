"""Mathematics on tensors: no files, no MLflow, nothing of ours outside this folder."""
