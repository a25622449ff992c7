"""Images, and which split each falls in. Imports nothing of ours outside this folder."""
