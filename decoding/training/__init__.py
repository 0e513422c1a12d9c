"""Rows of training: packed documents, clean and corrupted copies, and what an objective is."""
