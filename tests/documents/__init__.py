"""The pages of this project, run block by block."""
