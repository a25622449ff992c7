"""One file per entry point. `inputs` is what they start from; `main` alone is made of others."""
